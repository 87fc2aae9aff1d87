"""Records that are no JSON, or JSON of other forms than the documented one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.data.bad.cases import OK, Case, line, npy, sample
from tests.data.files import chat

_TYPES: list[Any] = [5, True, {}, [[]], [None], [5]]
_NOT_MEDIA: list[Any] = [
    *(5, True, {}, [[]], [None], [5], "", [""], {"path": 5}, {"path": ""}, {"bytes": "x"}),
    *({"base64": "!!"}, {"base64": 5}, {"path": ["a.jpg"]}),
]
_NOT_FPS: list[Any] = [0, -1, True, "25", [], [25, 25], [None], [[25]], {}, 10**400, -(10**400)]
_NOT_FPS += [float("inf"), float("nan"), 5e-324]
_NOT_DECIMALS: list[Any] = [-1, 7, 1.0, True, "1", [1], {}, 2**70, float("nan")]
_OUTSIDE = [
    *("../a.jpg", "pictures/../../a.jpg", "/etc/passwd", "//etc/passwd", "/../a.jpg"),
    *("file:///etc/passwd", "http://127.0.0.1:9/a.jpg", "gs://bucket/a.jpg", "memory://a.jpg"),
    *("zip://a.jpg::file:///a.zip", "./../a.jpg", "a/../../a.jpg"),
]
_NOWHERE = [
    *("%2e%2e/a.jpg", "..%2fa.jpg", "..\\a.jpg", "C:\\a.jpg", "~/a.jpg", "a\0.jpg", "a" * 300),
    *("a/" * 3000 + "a.jpg", "\ud800.jpg", "simplecache::a.jpg", "$HOME/a.jpg", "pictures"),
    *("good.png/a.jpg", "...", "|a", "\n"),
]


def _wrong_types() -> list[tuple[str, Any, tuple[str, ...]]]:
    bad, cases = ("bad_record",), []

    def add(field: str, values: list[Any], wants: tuple[str, ...], row: dict[str, Any]) -> None:
        cases.extend((f"{field} {v!r:.40}", {**row, field: v}, wants) for v in values)

    text = sample("Q")
    add("messages", [*_TYPES, "Q", ""], bad, {})
    add("conversations", [*_TYPES, "Q"], bad, {})
    add("images", _NOT_MEDIA, bad, sample("<image>?"))
    add("videos", _NOT_MEDIA, bad, sample("<video>?"))
    add("image", [5, {}, [[]]], bad, sample("<image>?"))
    add("fps", _NOT_FPS, bad, sample("<video>?", video="clips/whole.mp4"))
    decimals = sample("<video>?", video="clips/whole.mp4")
    add("timestamp_decimal", _NOT_DECIMALS, bad, decimals)
    add("task", [5, True, [], {}], bad, text)
    add("id", [5, 1.5, True, [], {}, "", "\ud800", "x" * 100_000, 2**70], (OK,), text)
    add("images", [[], None], (OK,), text)
    add("positions_thw", [[0], {}], ("unsupported_field",), sample("<image>?", image="good.png"))
    return cases


def _turns() -> list[tuple[str, Any, tuple[str, ...]]]:
    user, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    mismatch, turns, bad = ("placeholder_mismatch",), ("bad_turns",), ("bad_record",)
    return [
        ("no turns", {"messages": []}, bad),
        ("no fields", {}, bad),
        ("question alone", {"messages": [user]}, turns),
        ("answer alone", {"messages": [answer]}, turns),
        ("two questions", {"messages": [user, user, answer]}, turns),
        ("system alone", {"messages": [{"role": "system", "content": "S"}]}, turns),
        ("system late", {"messages": [user, {"role": "system", "content": "S"}, answer]}, turns),
        ("tool role", {"messages": [{**user, "role": "tool"}, answer]}, ("unknown_role",)),
        ("empty role", {"messages": [{**user, "role": ""}, answer]}, ("unknown_role",)),
        ("role 5", {"messages": [{**user, "role": 5}, answer]}, bad),
        ("no content", {"messages": [{"role": "user"}, answer]}, bad),
        ("content list", {"messages": [{**user, "content": [{"text": "Q"}]}, answer]}, bad),
        ("content null", {"messages": [user, {**answer, "content": None}]}, bad),
        ("empty answer", sample("Q", ""), ("empty_answer",)),
        ("blank answer", sample("Q", " \n\t"), ("empty_answer",)),
        ("end token", sample("Q<|im_end|>"), ("special_token_in_text",)),
        ("pad token", sample("Q", "<|image_pad|>"), ("special_token_in_text",)),
        ("picture without mark", sample("Q", image="good.png"), mismatch),
        ("mark without picture", sample("<image>?"), mismatch),
        ("two marks", sample("<image><image>?", image="good.png"), mismatch),
        ("mark in answer", sample("Q", "<image>", image="good.png"), mismatch),
        ("video mark for picture", sample("<video>?", image="good.png"), mismatch),
        ("missing picture", sample("<image>?", image="none.png"), ("missing_file",)),
        ("missing clip", sample("<video>?", video="none.mp4"), ("missing_file",)),
        ("picture as clip", sample("<image>?", image="clips/whole.mp4"), ("bad_image",)),
        ("too long", sample("word " * 3000), ("too_long",)),
        ("empty base64", sample("<image>?", image={"base64": ""}), ("bad_image",)),
        ("junk base64", sample("<image>?", image={"base64": "AAAA"}), ("bad_image",)),
        ("junk base64 clip", sample("<video>?", video={"base64": "AAAA"}), ("bad_video",)),
        ("NUL in text", sample("Q\0\0", "A\0"), (OK,)),
        ("odd spaces", sample("\u2028\u200b\ufeff", "A\u0085"), (OK,)),
        ("lone surrogate", sample("Q\ud83d"), bad),
        ("surrogate answer", sample("Q", "\udc80"), bad),
        ("surrogate pair", sample("Q\ud83d\ude00"), (OK,)),
        ("not a character", sample("Q\uffff\ufdd0"), (OK,)),
        ("long fps", sample("<video>?", video="clips/whole.mp4", fps=10**30), ("bad_record", OK)),
        ("big decimals in text", sample("Q", str(10**4000)), ("too_long",)),
        *(
            (f"section {i}", sample("<video>?", video="clips/whole.mp4", **section), allowed)
            for i, (section, allowed) in enumerate(
                [
                    ({"start": "1"}, ("bad_record",)),
                    ({"start": -1}, ("bad_record",)),
                    ({"start": 2, "end": 1}, ("bad_record",)),
                    ({"end": 0}, ("bad_record",)),
                    ({"start": float("nan")}, ("bad_record",)),
                    ({"start": 10**400}, ("bad_record",)),
                    ({"start": 1e8}, ("bad_video",)),
                    ({"start": 0, "end": 1e8}, (OK,)),
                    ({"videos": ["clips/whole.mp4"] * 2, "start": 0}, ("bad_record",)),
                ]
            )
        ),
    ]


def _grounding() -> list[tuple[str, Any, tuple[str, ...]]]:
    point = {
        "two_fps_timestamps": [0.5],
        "points": [[{"x": 5, "y": 5}]],
        "label": "cat",
        "count": 1,
        "question": "Where?",
        "video_id": "clips/whole",
    }
    track = {
        "points": [{"object_id": 0, "points": [[1, 1]] * 3}],
        "exp": "cat",
        "fps": 1,
        "w": 10,
        "h": 10,
        "clip": "whole",
        "video_dataset": "clips",
    }
    path = {
        "frame_trajectories": [
            {"time": 0.0, "points": [{"id": 1, "point": [1, 1], "occluded": False}]}
        ],
        "expression": "cat",
        "task": "track",
        "sampling_fps": 1,
        "width": 10,
        "height": 10,
        "video": "clips/whole",
    }
    nan, inf, huge = float("nan"), float("inf"), 10**400
    changes = [
        (point, "two_fps_timestamps", [5, [], ["x"], [nan], [inf], [None], [huge], {}]),
        (
            point,
            "points",
            [
                5,
                [],
                [[{}]],
                [[{"x": nan, "y": 1}]],
                [[{"x": huge, "y": 1}]],
                [[{"x": "5", "y": 1}]],
            ],
        ),
        (point, "count", [2, "1", -1]),
        (point, "label", [5, ["cat"], {}]),
        (point, "question", [5, []]),
        (track, "fps", [0, -1, nan, inf, huge, "1", 0.1]),
        (track, "w", [0, "10", nan, huge, []]),
        (
            track,
            "points",
            [
                5,
                [5],
                [{}],
                [{"object_id": [], "points": [[1, 1]]}],
                [{"object_id": 0, "points": [[1]]}],
            ],
        ),
        (track, "exp", [5, []]),
        (
            path,
            "frame_trajectories",
            [5, [5], [{}], [{"time": nan, "points": path["frame_trajectories"][0]["points"]}]],
        ),
        (path, "sampling_fps", ["x", None, 0, nan, []]),
        (path, "width", [0, -10, huge]),
    ]
    cases = [("points", point, (OK,)), ("track", track, (OK,)), ("path", path, (OK,))]
    for row, field, values in changes:
        name = "points" if row is point else "track" if row is track else "path"
        for value in values:
            cases.append((f"{name}.{field} {value!r:.30}", {**row, field: value}, ("bad_record",)))
    return cases


def _texts() -> list[tuple[str, bytes, tuple[str, ...]]]:
    """Lines that are not what json.dumps writes."""
    good = line(sample("Q", id="text"))
    json_, record, fine = ("bad_json",), ("bad_record",), (OK,)
    cases = [(f"cut at {i}", good[:i], json_) for i in (1, 9, 30, len(good) - 1)]
    return cases + [
        ("nothing", b"nothing", json_),
        ("null", b"null", record),
        ("number", b"5", record),
        ("NaN", b"NaN", record),
        ("text", b'"Q"', record),
        ("list", b"[" + good + b"]", record),
        ("two objects", good + good, json_),
        ("bad UTF-8", good.replace(b"Q", b"\xff\xfe"), json_),
        ("latin-1", good.replace(b"Q", b"K\xe4fer"), json_),
        ("UTF-16", good.decode().encode("utf-16-le"), (OK, *json_)),
        ("byte order mark", b"\xef\xbb\xbf" + good, fine),
        ("NUL bytes", bytes(40), json_),
        ("NUL inside", good.replace(b"Q", b"\0"), json_),
        ("deep lists", b"[" * 100_000 + b"]" * 100_000, json_),
        ("deep id", good.replace(b'"text"', b"[" * 900 + b"]" * 900), (OK, *json_)),
        ("deep object", b'{"a":' * 50_000 + b"1" + b"}" * 50_000, json_),
        ("long number", good.replace(b'"text"', b"9" * 5000), json_),
        ("1e999 id", good.replace(b'"text"', b"1e999"), fine),
        ("twice the key", good[:-1] + b', "id": "b"}', fine),
        ("trailing comma", good[:-1] + b",}", json_),
        ("single quotes", good.replace(b'"', b"'"), json_),
        ("a million keys", line({f"k{i}": i for i in range(20_000)}), record),
    ]


def _canvases(folder: Path) -> list[tuple[str, Any, tuple[str, ...]]]:
    """Pictures with .npy files of positions: of wrong types, lying, pickled."""
    rows, columns = np.meshgrid(np.arange(4), np.arange(6), indexing="ij")
    each = np.stack([np.zeros((4, 6), int), rows, columns], -1).reshape(-1, 3)
    good = np.concatenate([each + [3 * i, 0, 0] for i in range(2)]).astype(np.int32)
    Image.new("RGB", (84, 56), (90, 90, 90)).save(folder / "canvas.png")
    head = npy(good)
    objects = npy(np.array([{}, 5], object), allow_pickle=True)
    files = {
        "good": (head, (OK,)),
        "empty": (b"", ("bad_record",)),
        "text": (b"positions", ("bad_record",)),
        "cut": (head[:300], ("bad_record",)),
        "cut head": (head[:40], ("bad_record",)),
        "pickled": (objects, ("bad_record",)),
        "bare pickle": (b"\x80\x04]\x94.", ("bad_record",)),
        "zip": (b"PK\x03\x04" + bytes(50), ("bad_record",)),
        "float": (npy(good.astype(float)), ("bad_record",)),
        "bool": (npy(good.astype(bool)), ("bad_record",)),
        "text array": (npy(good.astype("U4")), ("bad_record",)),
        "flat": (npy(good.reshape(-1)), ("bad_record",)),
        "short": (npy(good[:-1]), ("bad_record",)),
        "none": (npy(good[:0]), ("bad_record",)),
        "two columns": (npy(good[:, :2]), ("bad_record",)),
        "beyond 32 bit": (npy(good.astype(np.int64) + [2**40, 0, 0]), ("bad_record",)),
        "beyond the grid": (npy(good + [0, 0, 50]), ("bad_record",)),
        "says 10**12 rows": (
            head.replace(b"(48, 3), }", b"(%d, 3), }" % 10**12)[: len(head)],
            ("bad_record",),
        ),
        "says -1 rows": (head.replace(b"(48, 3)", b"(-1, 3)"), ("bad_record",)),
    }
    cases = []
    for name, (data, wants) in files.items():
        (folder / f"{name}.npy").write_bytes(data)
        row = sample(
            "<image><image>?", images=["canvas.png"] * 2, patch_positions=f"{name}.npy", fps=10
        )
        cases.append((f"positions {name}", row, wants))
    for name in ("clips/pipe.mp4", "clips", "nowhere.npy"):
        row = sample("<image><image>?", images=["canvas.png"] * 2, patch_positions=name)
        cases.append((f"positions {name}", row, ("missing_file",)))
    return cases


def record_cases(folder: Path) -> list[Case]:
    """Needs `folder`/clips; writes some small files."""
    Image.new("RGB", (84, 56), (90, 90, 90)).save(folder / "good.png")
    rows = _wrong_types() + _turns() + _grounding() + _canvases(folder)
    rows += [
        (f"outside {p}", sample("<image>?", image=p), ("path_outside_root",)) for p in _OUTSIDE
    ]
    rows += [
        (f"nowhere {p!r:.30}", sample("<image>?", image=p), ("missing_file",)) for p in _NOWHERE
    ]
    rows += [
        (f"clip nowhere {p!r:.30}", sample("<video>?", video=p), ("missing_file",))
        for p in _NOWHERE
    ]
    cases = [Case(f"record {name}", wants, json.dumps(row).encode()) for name, row, wants in rows]
    return cases + [Case(f"line {name}", wants, text) for name, text, wants in _texts()]


def good_rows(folder: Path) -> list[dict[str, Any]]:
    """Samples that nothing is wrong with."""
    kinds = [
        sample("Q", "A"),
        sample("<image>?", "A", image="good.png"),
        sample("<video>?", "A", video="clips/whole.mp4"),
        {"messages": chat("Q", "A", "Q2", "A2", system="S")},
    ]
    return [{**kinds[i % len(kinds)], "id": f"good-{i}"} for i in range(24)]
