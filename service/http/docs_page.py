"""/docs: the OpenAPI document as one page of HTML. No script, no font and no style comes from anywhere else, so it also
works where the service does: behind a firewall.
"""

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1f24;background:#fff}
h2{margin-top:2.5rem;border-bottom:1px solid #d0d7de}code,.verb{font:14px ui-monospace,monospace}
.verb{background:#0a5;color:#fff;border-radius:4px;padding:2px 8px}.verb.get{background:#06c}
table{border-collapse:collapse;width:100%}th,td{text-align:left;vertical-align:top;padding:4px 12px 4px 0;
border-bottom:1px solid #eaeef2}section{margin:1.5rem 0}a{color:#06c}
@media(prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}a{color:#6cb6ff}th,td,h2{border-color:#30363d}}
"""


def render(document: Mapping[str, Any]) -> str:
    """The page of an OpenAPI 3 document."""
    info = document["info"]
    operations = [
        _operation(path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    schemas = [_schema(name, schema) for name, schema in document["components"]["schemas"].items()]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(info['title'])}</title><style>{STYLE}</style></head><body>"
        f"<h1>{escape(info['title'])}</h1><p>{escape(info.get('description', ''))}</p>"
        '<p>For programs: <a href="openapi.json">openapi.json</a></p>'
        f"<h2>Routes</h2>{''.join(operations)}<h2>Schemas</h2>{''.join(schemas)}</body></html>"
    )


def _operation(path: str, method: str, operation: Mapping[str, Any]) -> str:
    rows = [
        (f"<code>{escape(parameter['name'])}</code> in the {parameter['in']}", escape(parameter.get("description", "")))
        for parameter in operation.get("parameters", [])
    ]
    if "requestBody" in operation:
        rows.append(("body", _contents(operation["requestBody"])))
    rows += [
        (escape(status), f"{escape(response.get('description', ''))} {_contents(response)}")
        for status, response in operation["responses"].items()
    ]
    return (
        f'<section><h3><span class="verb {method}">{method.upper()}</span> <code>{escape(path)}</code></h3>'
        f"<p>{escape(operation.get('summary', ''))}</p>{_table(rows)}</section>"
    )


def _contents(part: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{_type(content.get('schema', {}))} as <code>{escape(media_type)}</code>"
        for media_type, content in part.get("content", {}).items()
    )


def _schema(name: str, schema: Mapping[str, Any]) -> str:
    required = schema.get("required", [])
    rows = [
        (
            f"<code>{escape(field)}</code>{'' if field in required else ' (optional)'}",
            _type(details),
            escape(details.get("description", "")),
        )
        for field, details in schema.get("properties", {}).items()
    ]
    heading = f'<section id="{escape(name)}"><h3><code>{escape(name)}</code></h3>'
    return f"{heading}<p>{escape(schema.get('description', ''))}</p>{_table(rows)}</section>"


def _type(schema: Mapping[str, Any]) -> str:
    """A JSON schema in a few words, with a link for each schema that it names."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}"><code>{name}</code></a>'
    if "anyOf" in schema:
        return " or ".join(_type(option) for option in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(f"<code>{escape(str(value))}</code>" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if isinstance(schema.get("additionalProperties"), Mapping):
        return f"object of {_type(schema['additionalProperties'])}"
    return escape(str(schema.get("const", schema.get("type", "anything"))))


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    """Cells are HTML already."""
    return f"<table>{''.join('<tr><td>' + '</td><td>'.join(row) + '</td></tr>' for row in rows)}</table>"
