"""The OpenAPI document, made of the request's dataclasses."""

from importlib.metadata import version
from typing import Any

from dalle_jax.serve.image_request import request_schema

_ERRORS = {
    400: "Something in the request is not as it has to be",
    401: "A token is needed",
    408: "The request took too long to arrive",
    413: "The request is too large",
    415: "The request is not JSON",
    429: "Too many images wait; the header Retry-After says for how many seconds",
    504: "The images were not ready in time",
}
_IMAGE = {
    "type": "object",
    "required": ["number", "b64_json"],
    "properties": {
        "number": {"type": "integer", "description": "Which sample it is"},
        "b64_json": {"type": "string", "description": "PNG in base64"},
        "score": {"type": "number", "description": "Of the CLIP, if there is one"},
    },
}
_IMAGES = {
    "type": "object",
    "required": ["created", "model", "prompt", "seed", "sampling", "seconds", "data"],
    "properties": {
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "prompt": {"type": "string"},
        "seed": {"type": "integer"},
        "sampling": {"type": "object"},
        "seconds": {"type": "number"},
        "data": {"type": "array", "items": _IMAGE},
    },
}
_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "object"}}}


def openapi_document(model: str) -> dict[str, Any]:
    """Describes the server's addresses.

    Args:
      model: its name.
    """
    own = request_schema()
    text = {"type": ["string", "null"]}
    names = dict.fromkeys(("size", "response_format", "model", "user"), text)
    openai = own | {"properties": own["properties"] | names}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"dalle_jax: {model}", "version": version("dalle_jax")},
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {"ImageRequest": own, "GenerationsRequest": openai, "Images": _IMAGES},
        },
        "security": [{}, {"token": []}],
        "paths": {
            "/v1/images": {"post": _post("Generate, edit or vary images", "ImageRequest")},
            "/v1/images/generations": {"post": _post("With OpenAI's names", "GenerationsRequest")},
            "/v1/models": {"get": _get("The model and the server's limits", "application/json")},
            "/healthz": {"get": _get("Whether the server works", "application/json")},
            "/metrics": {"get": _get("Counters for Prometheus", "text/plain")},
        },
    }


def _post(summary, schema):
    media = {"application/json": {"schema": _reference("Images")}}
    media["text/event-stream"] = {}
    text = "Images, or server-sent events if `stream` is true"
    answers = {"200": {"description": text, "content": media}}
    for status, text in _ERRORS.items():
        content = {"application/json": {"schema": _ERROR}}
        answers[str(status)] = {"description": text, "content": content}
    body = {"required": True, "content": {"application/json": {"schema": _reference(schema)}}}
    return {"summary": summary, "requestBody": body, "responses": answers}


def _get(summary, media):
    answers = {"200": {"description": summary, "content": {media: {}}}}
    return {"summary": summary, "responses": answers | {"401": {"description": _ERRORS[401]}}}


def _reference(schema):
    return {"$ref": f"#/components/schemas/{schema}"}
