"""A Griffe extension: fields declared with rules for their values are shown with their defaults."""

import ast
from typing import Any

import griffe


class Defaults(griffe.Extension):
    """Shows `total_timesteps: int = 500000`, not the call that declares its bounds."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **_: Any) -> None:
        value = getattr(node, "value", None)
        if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Name):
            return
        if value.func.id == "bounded":
            default = ast.unparse(value.args[0])
            attr.value = "'auto'" if default == "AUTO" else default
