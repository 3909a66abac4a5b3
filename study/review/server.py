"""The review's page and what it asks for, over HTTP on this machine alone."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flask import Flask, Response, abort, request
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from core.errors import UserError
from study.review.pixels import Pictures, panes
from study.review.session import ABSENT, ACTIONS, Review, Stale

HOST = "127.0.0.1"
PAGE = Path(__file__).parent / "page"
FILES = {"": "index.html", "review.js": "review.js", "view.js": "view.js", "review.css": "review.css"}
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:"


class _Quiet(WSGIRequestHandler):
    """A connection that stays open for further requests, and of which nothing is printed."""

    protocol_version = "HTTP/1.1"

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing."""


def review_server(review: Review, order: Sequence[str], port: int, train: str = "", calibrated: bool = True
                  ) -> BaseWSGIServer:
    """A server on the loopback interface that is ready to serve; port 0: any free one. UserError: the port is taken.

    `order` is that of the images on the page, `train` the command that it names for training with the new labels. The
    page says so where expected errors are known not to be `calibrated`.
    """
    try:
        listening = socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port} cannot be listened on ({error}); choose another, or 0 for any free one"
                        ) from None
    with listening:  # the server has a descriptor of its own
        app = review_app(review, order, train, calibrated)
        return make_server(HOST, port, app, threaded=True, request_handler=_Quiet, fd=listening.fileno())


def review_app(review: Review, order: Sequence[str], train: str = "", calibrated: bool = True) -> Flask:
    """The application. Changes come as JSON and to this host by name, which other sites' pages cannot send."""
    app, pictures = Flask(__name__, static_folder=None), Pictures()
    keys = list(order)

    def refuse_others() -> None:
        name = request.host.rsplit(":", 1)[0]
        if name not in (HOST, "localhost") or (request.method == "POST" and not request.is_json):
            abort(403)

    def guarded(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = POLICY
        response.headers.setdefault("Cache-Control", "no-store")
        return response

    def refused(error: UserError) -> tuple[dict[str, str], int]:
        return {"message": str(error)}, 400

    app.before_request(refuse_others)
    app.after_request(guarded)
    app.register_error_handler(UserError, refused)
    for address, name in FILES.items():
        app.add_url_rule(f"/{address}", name, partial(_file, PAGE / name))
    app.add_url_rule("/state", "state", lambda: _state(review, keys, train, calibrated))
    app.add_url_rule("/image/<int:number>", "image", lambda number: _image(review, _key(keys, number)))
    app.add_url_rule("/pixels/<int:number>", "pixels", lambda number: _pixels(review, pictures, _key(keys, number)))
    app.add_url_rule("/change/<int:number>", "change", lambda number: _change(review, _key(keys, number)),
                     methods=["POST"])
    return app


def _key(keys: Sequence[str], number: int) -> str:
    if number >= len(keys):
        abort(404)
    return keys[number]


def _file(path: Path) -> Response:
    return Response(path.read_bytes(), content_type=f"{KINDS[path.suffix]}; charset=utf-8")


def _state(review: Review, keys: Sequence[str], train: str, calibrated: bool) -> dict[str, Any]:
    """The images in their order, and what is the same for all of them."""
    return {"data_set": str(review.labels.root), "who": review.who, "names": review.labels.names, "train": train,
            "calibrated": calibrated, "images": [_brief(review, key) for key in keys]}


def _brief(review: Review, key: str) -> dict[str, Any]:
    answer, image = review.answers.get(key), review.images[key]
    doubt = None if answer is None or np.isnan(answer.doubt) else answer.doubt
    return {"id": key, "version": image.version, "open": sum(mark is None for mark in image.marks), "doubt": doubt,
            "unit": "" if answer is None else answer.unit}


def _image(review: Review, key: str) -> dict[str, Any]:
    """An image with its landmarks: [x, y[, z]] in stored pixels, `radius` in pixels along each of these axes."""
    record, answer, image = review.labels.records[key], review.answers.get(key), review.images[key]
    geometry, landmarks = record.file_geometry(), []
    for number, (name, mark) in enumerate(zip(review.labels.names, image.marks, strict=True)):
        each: dict[str, Any] = {"name": name, "at": mark if isinstance(mark, tuple) else None,
                                "state": "open" if mark is None else ABSENT if mark == ABSENT else "labelled",
                                "predicted": review.predicted(key, number), "expected": None, "radius": None}
        if answer is not None and not np.isnan(answer.radius90[number]):
            each["radius"] = [float(answer.radius90[number]) / step for step in reversed(answer.spacing)]
            each["radius90"] = float(answer.radius90[number])
        if answer is not None and not np.isnan(answer.expected_error[number]):
            each["expected"] = float(answer.expected_error[number])
        landmarks.append(each)
    spacing = geometry.spacing_mm or record.spacing or (1.0,) * len(geometry.size)
    return {**_brief(review, key), "size": geometry.size[::-1], "spacing": spacing[::-1], "panes": panes(geometry),
            "landmarks": landmarks, "undo": len(image.done), "redo": len(image.undone)}


def _pixels(review: Review, pictures: Pictures, key: str) -> Response:
    """Little-endian pixels row by row of an image, or of the slice `at` through a volume's axis `fixed` (x 0, y 1, ..).

    The header X-Pixels says what they are: {"rows", "columns", "bytes": 1 or 2, "window": [black, white]}.
    """
    found = pictures.get(review.labels.records[key].image)
    fixed = request.args.get("fixed", type=int)
    if fixed is not None and not 0 <= fixed < found.pixels.ndim:
        abort(404)
    axis = None if fixed is None else found.pixels.ndim - 1 - fixed
    part = found.slice(axis, request.args.get("at", 0, type=int))
    if request.args.get("turned"):  # the page's rows are the later axis
        part = part.T
    part = np.ascontiguousarray(part, dtype=part.dtype.newbyteorder("<"))
    what = {"rows": part.shape[0], "columns": part.shape[1], "bytes": part.itemsize, "window": found.window}
    return Response(part.tobytes(), content_type="application/octet-stream",
                    headers={"X-Pixels": json.dumps(what)})


def _change(review: Review, key: str) -> tuple[dict[str, Any], int]:
    """Do what is asked; the image as it is then, with status 409 where it was asked of an older state."""
    asked = request.get_json()
    try:
        action, version = asked["action"], int(asked["version"])
        landmark, to = asked.get("landmark"), asked.get("to")
        place = None if to is None else tuple(map(float, to))
        if action not in ACTIONS or not (landmark is None or isinstance(landmark, int)):
            raise ValueError(action)
    except (KeyError, TypeError, ValueError):
        abort(400)
    try:
        review.change(key, version, action, landmark, place, asked.get("change"))
    except Stale:
        return {**_image(review, key), "message": f"{key} was changed elsewhere meanwhile (another tab, or its labels "
                "on disk); this is its state now, and your last change was not made"}, 409
    return _image(review, key), 200
