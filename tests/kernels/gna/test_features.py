"""The table of what each backend can do."""

from conceptax.kernels.gna import api, features


def test_the_page_says_what_the_functions_say(repository):
    page = (repository / "docs" / "gna.md").read_text()
    _, rest = page.split(features.BEGIN)
    written, _ = rest.split(features.END)
    assert written.strip() == features.table(), (
        "write it anew: python -m conceptax.kernels.gna.features docs/gna.md"
    )


def test_the_table_does_not_depend_on_what_is_installed(monkeypatch):
    before = features.table()
    monkeypatch.setattr(api, "NEEDS", dict.fromkeys(api.NEEDS, lambda platform: "it is not here"))
    assert features.table() == before


def test_every_backend_has_a_column():
    heads = features.table().splitlines()[0]
    assert all(f"`{name}` (" in heads for name in api.BACKENDS)


def test_writes_into_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{features.BEGIN}\nold\n{features.END}\nafter\n")
    features.write(page)
    assert page.read_text() == (
        f"before\n{features.BEGIN}\n{features.table()}\n{features.END}\nafter\n"
    )
