"""Shell scripts from the templates of launch/platforms/templates."""

import pathlib
import shlex

import jinja2

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "templates"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    autoescape=False,  # these are shell scripts: every value goes through `quote`
)
_TEMPLATES.filters["quote"] = lambda value: shlex.quote(str(value))
_TEMPLATES.filters["join_quoted"] = shlex.join


def render(template: str, **values: object) -> str:
    """Renders a template; its filters `quote` and `join_quoted` make shell words of values."""
    return _TEMPLATES.get_template(template).render(**values).rstrip("\n") + "\n"
