"""HTML to text, by resiliparse: what is to be read stays, what serves to find one's way goes."""

import re
from html import unescape
from pathlib import Path
from typing import Any

from hylo.errors import HyLoError

# What is around the text in pages of Sphinx, DocBook, Doxygen, Texinfo, Javadoc and their like.
_AROUND = (
    "nav, footer, script, style, .navheader, .navfooter, .related, .sphinxsidebar, .headerlink, .viewcode-link, "
    ".linenos, .navigation, .nav_header, .nav_footer, .node-nav, .nav, .sidebar, .breadcrumb, .breadcrumbs, .footer, "
    "#footer, #navigation, .toc, #toc, #TOC, .copyright, .navset, .navsettop, .navsetbottom, .versionbox, .tocset, "
    "#nav-path, #nav-tree, #side-nav, #top, .header-controls, .editsection, .mw-editsection, .printfooter, .catlinks, "
    ".permalink"
)
_LINK = re.compile(rb"""<a\b[^>]*?\bhref\s*=\s*["']([^"'>]+)["']""", re.IGNORECASE)


def _resiliparse() -> tuple[Any, Any]:
    try:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.html import HTMLTree
    except ImportError:
        raise HyLoError("reading HTML needs resiliparse; install it with: pip install 'hylo[corpus]'") from None
    return HTMLTree, extract_plain_text


def _tree(content: bytes) -> Any:
    tree, _ = _resiliparse()
    encoding = "utf-8"
    try:
        content.decode(encoding)
    except UnicodeDecodeError:
        encoding = "latin-1"
    return tree.parse_from_bytes(content, encoding)


def html_text(content: bytes) -> str:
    """The text of a page, with line breaks, lists and preformatted blocks as they are shown.

    Raises HyLoError where resiliparse is not installed.
    """
    _, extract = _resiliparse()
    tree = _tree(content)
    if tree.body is None:
        return ""
    for element in tree.body.query_selector_all(_AROUND):
        element.decompose()
    return str(extract(tree, main_content=True, list_bullets=True, alt_texts=False, form_fields=False, noscript=False))


def html_links(content: bytes) -> list[str]:
    """Where a page's links lead, in order, within its own site and without the place on the page."""
    # A parser would take longer to give its links out than to read the page.
    targets = [unescape(target.decode("utf-8", "replace")) for target in _LINK.findall(content)]
    local = [target.partition("#")[0].partition("?")[0] for target in targets if "://" not in target]
    return list(dict.fromkeys(target for target in local if target and not target.startswith("mailto:")))


def reading_order(files: dict[str, Path], contents: str) -> list[str]:
    """The pages of a manual in the order in which following every link leads to them, the others after them.

    Args:
        files: pages by name.
        contents: the first of them.

    Raises:
        HyLoError: where there is no such page.
    """
    if contents not in files:
        raise HyLoError(f"there is no page {contents}; expected one such as {next(iter(files), 'index.html')}")
    order: dict[str, None] = {}
    waiting = [contents]
    while waiting:
        name = waiting.pop()
        if name in order:
            continue
        order[name] = None
        # From the last to the first, so that the first is taken next, and what it leads to before the second.
        for target in reversed(html_links(files[name].read_bytes())):
            linked = _resolved(name, target)
            if linked in files and linked not in order:
                waiting.append(linked)
    return [*order, *(name for name in files if name not in order)]


def _resolved(page: str, target: str) -> str:
    """The name of the page that a link leads to."""
    parts: list[str] = []
    for part in [*page.split("/")[:-1], *target.split("/")]:
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)
