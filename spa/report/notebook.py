"""Small tables in HTML, which notebooks show for a result."""

from __future__ import annotations

from collections.abc import Sequence

_TABLE = (
    "<table><thead><tr>{% for title in head %}<th>{{ title }}</th>{% endfor %}</tr></thead><tbody>"
    "{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</tbody></table>"
    "{% for note in notes %}<p>{{ note }}.</p>{% endfor %}"
)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Return a table with sentences below it.

    >>> table(("name",), [("a<b",)])
    '<table><thead><tr><th>name</th></tr></thead><tbody><tr><td>a&lt;b</td></tr></tbody></table>'
    """
    from jinja2 import Environment  # slow to import

    return Environment(autoescape=True).from_string(_TABLE).render(head=head, rows=rows, notes=notes)
