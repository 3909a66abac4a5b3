"""The pages in Markdown: each link leads to a file and a heading that are there, and pictures load quickly."""

import re

import pytest

from tests.conftest import PROJECT

PAGES = sorted(path for folder in ("", "docs", "docs/results", "datasets", "ddpm_pretraining")
               for path in (PROJECT / folder).glob("*.md"))


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings: lower case, without marks, spaces as hyphens."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title)).strip().lower().replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", text, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(PROJECT).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf8"), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path.read_text(encoding="utf8")), target


def test_pictures_of_the_session_are_small_and_shown():
    """GitHub shows PNG and JPEG by a relative path; each is below 150 kB."""
    text = (PROJECT / "docs/own_data.md").read_text(encoding="utf8")
    shown = re.findall(r"!\[[^\]]+\]\((images/[^)]+)\)", text)
    assert 2 <= len(shown) <= 4
    for name in shown:
        content = (PROJECT / "docs" / name).read_bytes()
        assert content[:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0") and len(content) < 150_000, name
