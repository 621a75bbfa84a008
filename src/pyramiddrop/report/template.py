"""Load the HTML templates."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from pyramiddrop.report import units


def template(name: str) -> Template:
    """The template `name`.html.j2, with the units of this project as filters."""
    environment = Environment(
        loader=PackageLoader("pyramiddrop.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"flops": units.flops, "size": units.size, "seconds": units.seconds, "share": units.share}
    return environment.get_template(f"{name}.html.j2")
