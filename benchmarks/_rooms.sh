# Sourced with a scratch folder: the package without an installation, its rooms under one roof.
mkdir "$1/path"
cp -r src/conceptax "$1/path/conceptax"
for room in flax_models methods kernels converters; do
    cp -r "$room" "$1/path/conceptax/$room"
done
export PYTHONPATH="$1/path${PYTHONPATH:+:$PYTHONPATH}"
