"""What a command says of itself: its help, groups, corrections, and completion in a shell."""

import re
import shutil
import subprocess

import pytest

from conceptax.cli import main
from conceptax.cli.commands import COMMANDS, load
from conceptax.cli.completion import Command as Completion
from conceptax.cli.completion import run as complete
from conceptax.cli.describe import described


def said(capsys, *arguments, status=0):
    assert main(list(arguments)) == status
    out, err = capsys.readouterr()
    return out + err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_and_the_flags_that_people_use(name, capsys):
    short, whole = (said(capsys, *name.split(), flag) for flag in ("--help", "--help-all"))
    declared, flags = COMMANDS[name], described(load(name, [])[1])
    for text in (short, whole):
        assert text.startswith(f"usage: conceptax {name}")
        joined = " ".join(text.replace("\\\n", "").split())
        assert all(" ".join(example.split()) in joined for example in declared.examples)
        assert max(map(len, text.splitlines())) <= 90
    assert len(short.splitlines()) <= 45 and len(declared.main) <= 11
    known = {flag.name for flag in flags}
    assert set(declared.main) <= known
    shown = set(re.findall(r"^  (--[a-z][\w.-]+)", short, re.MULTILINE))
    assert shown == set(declared.main) | {flag.name for flag in flags if not flag.stands} - {""}
    # Every flag is followed by words, not by its default alone.
    for flag in flags:
        assert re.match(r"[\w\"'<({+-]", flag.text), flag


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_calls_of_the_command(name):
    known = {flag.name: flag for kind in kinds(name) for flag in described(kind)}
    for example in COMMANDS[name].examples:
        if not example.startswith(f"conceptax {name} "):
            continue  # what to do with the result
        words = re.split(r" [>#] ", example)[0].split()
        for flag, value in zip(words, [*words[1:], ""], strict=True):
            if flag.startswith("--"):
                assert flag in known, example
                assert not known[flag].choices or value in known[flag].choices, example


def kinds(name):
    module, kind = load(name, [])
    return [kind, *getattr(module, "types", dict)().values()]


def test_a_switch_says_what_it_does(capsys):
    """Those that are on by default are flags that put them off, and say so."""
    text = " ".join(said(capsys, "erase", "--help-all").split())
    assert "--no-free-concept not: let the attack move the concept's own token" in text
    text = " ".join(said(capsys, "personalize", "--help-all").split())
    assert re.search(r"--no-flip not: \w", text)


@pytest.mark.parametrize("arguments", [["segment"], ["segment", "--help"], ["gna"], ["glyphs"]])
def test_a_group_answers_for_itself(arguments, capsys):
    text = said(capsys, *arguments)
    names = [name for name in COMMANDS if name.split()[0] == arguments[0]]
    assert len(names) > 0 and all(f"  {name} " in text for name in names)


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ("erse", "no command 'erse' (did you mean erase?)"),
        ("segment rnu", "there is no 'rnu' (did you mean run?)"),
        ("gna simulat", "did you mean simulate?"),
        ("erase --cycels 3", "there is no --cycels (did you mean --cycles?)"),
        ("erase --learning_rat=3", "did you mean --learning-rate"),
        ("erase --method uce --check-steps 3", "--check-steps is a setting of sage, not of"),
        (
            "personalize --method dreambooth --spl-weight 1",
            "--spl-weight is a setting of class-diffusion, not of",
        ),
        ("sample --prompt a --sampler eulr", "received 'eulr' (did you mean euler?)"),
        ("sample --prompt a --steps", "--steps takes a value: INT."),
        ("sample --prompt a --steps=many", "--steps takes a whole number, received 'many'."),
        ("erase --concept a --eta x", "--eta takes a number, received 'x'."),
        ("erase --concept a --method sagee", "--method takes sage, esd-x, "),
        ("sample --prompt a --gpu 1", "there is no --gpu (did you mean"),
        ("inspect", "PATH is missing; `conceptax inspect --help` shows examples."),
        ("inspect --names 3", "PATH is missing"),
        ("convert folder --form single", "DEST is missing"),
        ("segment train", "--data PATH and --vocabulary TEXT are missing"),
        ("completion tcsh", "SHELL takes bash, zsh, fish; received 'tcsh'"),
        ("doctor now", "there is no place for 'now'"),
        ("inspect one two", "there is no place for 'two'"),
        ("sample --prompt a b", "there is no place for 'b'"),
        ("erase --concept", "--concept takes a value: TEXT."),
        ("erase --concept a --mesh 2", "--mesh takes values: DATA FSDP."),
        ("segment train --rates * x", "--rates takes a number, received 'x'."),
        ("gna simulate --layout 8 x", "--layout takes a whole number, received 'x'."),
        ("gna simulate --layout=8 8 --window 3 --causal perhaps", "'perhaps'"),
        (
            "erase --concept a --force=yes",
            "--force is a switch and takes no value; received 'yes'.",
        ),
        ("erase --concept a --mesh 2 x", "--mesh takes a whole number, received 'x'."),
        # What the parser alone knows.
        ("glyphs train --unet.steps 0", "unet: steps must be at least 1, received 0; "),
    ],
)
def test_wrong_words_are_corrected(arguments, answer, capsys):
    told = said(capsys, *arguments.split(), status=2)
    assert answer in told and told.startswith("conceptax") and told.count("\n") == 1, told


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory):
    file = tmp_path_factory.mktemp("completion") / "conceptax.bash"
    shell = shutil.which("bash")
    if shell is None:
        pytest.skip("there is no bash")
    return shell, file


@pytest.mark.parametrize(
    ("words", "some"),
    [
        (["se"], {"segment"}),
        (["segment", ""], {"run", "evaluate", "train"}),
        (["evaluate", "--ed"], {"--edited"}),
        (["evaluate", "personalization", "--di"], {"--dino"}),
        (["erase", "--method", ""], {"sage", "uce"}),
        (["erase", "--erase-w"], {"--erase-weight"}),
        (["gna", "simulate", "--gpu", "h"], {"h100", "h200"}),
        (["sample", "--pro"], {"--prompt", "--prompts"}),
        (["erase", "--method", "=", "s"], {"sage"}),
        (["completion", ""], {"bash", "zsh", "fish"}),
    ],
)
def test_bash_completes(words, some, bash_script, capsys):
    shell, file = bash_script
    if not file.exists():
        complete(Completion("bash"))
        file.write_text(capsys.readouterr().out)
    quoted = " ".join(f"'{word}'" for word in ("conceptax", *words))
    script = (
        f"source {file}; COMP_WORDS=({quoted}); COMP_CWORD={len(words)}; _conceptax; "
        'echo "${COMPREPLY[@]}"'
    )
    ended = subprocess.run([shell, "-c", script], capture_output=True, text=True, check=True)
    found = set(ended.stdout.split())
    assert some <= found and all(each.startswith(words[-1]) for each in found)


def test_zsh_takes_that_of_bash(bash_script, capsys):
    """With zsh's own completion running, and without names that mean something to it."""
    complete(Completion("zsh"))
    first, second, *body = capsys.readouterr().out.splitlines()
    assert first == "(( $+functions[compdef] )) || { autoload -U +X compinit && compinit; }"
    assert second == "autoload -U +X bashcompinit && bashcompinit"
    own = r"words|CURRENT|PREFIX|SUFFIX|IPREFIX|QIPREFIX|compstate|status|path|argv|options"
    assert not re.search(rf"\b({own})=|\$\{{?({own})\b", "\n".join(body))
    shell, _ = bash_script
    subprocess.run([shell, "-n"], input="\n".join(body), text=True, check=True)


def fish_words(line):
    """The words of a line of fish, quotes off; there is nothing between them but spaces."""
    found = re.findall(r"('(?:[^'\\]|\\['\\])*'|[^\s'\"$()*?\\;&|<>#~{}]+)(?: |$)", line)
    words = [re.sub(r"\\(.)", r"\1", word[1:-1]) if word[0] == "'" else word for word in found]
    assert " ".join(found) == line
    return words


def test_fish_knows_every_flag_where_it_is_one(capsys):
    complete(Completion("fish"))
    text = capsys.readouterr().out
    offered, flags, files = {}, {}, set()
    for line in text.splitlines():
        command, *rest = fish_words(line)
        assert command == "complete" and rest[:2] == ["-c", "conceptax"]
        options, rest = {}, rest[2:]
        while rest:
            option = rest.pop(0)
            assert option in {"-f", "-F", "-r", "-x", "-n", "-l", "-a", "-d"}, line
            options[option] = rest.pop(0) if option in {"-n", "-l", "-a", "-d"} else ""
        seen = re.sub(r"__fish_seen_subcommand_from (\S+)( && )?", r"\1 ", options.get("-n", ""))
        seen = seen.replace("__fish_use_subcommand", "").strip()
        if "-l" in options:
            flags.setdefault(seen, {})[f"--{options['-l']}"] = options
        elif "-a" in options:
            offered.setdefault(seen, []).append(options["-a"])
        elif "-F" in options:
            files.add(seen)
    assert offered.pop("") == list(dict.fromkeys(name.split()[0] for name in COMMANDS))
    assert offered.pop("completion") == ["bash", "zsh", "fish"]
    assert offered == {
        first: [name.split()[1] for name in COMMANDS if name.startswith(f"{first} ")]
        for first in ("evaluate", "segment", "glyphs", "gna")
    }
    assert files == {"convert", "inspect", "report", "segment run", "segment coco-stuff"}
    assert set(flags.pop("")) == {"--help", "--help-all", "--debug", "--offline", "--yes"}
    for name in COMMANDS:
        known = {flag.name: flag for kind in kinds(name) for flag in described(kind) if flag.name}
        assert set(flags.get(name, {})) == set(known)
        for flag, options in flags.get(name, {}).items():
            assert options["-d"] == known[flag].text
            assert options.get("-a", "").split() == list(known[flag].choices)
            assert ("-r" in options or "-x" in options) == bool(known[flag].value)
