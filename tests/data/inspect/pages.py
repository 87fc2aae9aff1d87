"""Data that has every kind of sample, and a reader of the pages that inspect makes of it."""

import base64
import html.parser
import io
import json
from pathlib import Path

import av
import numpy as np
from PIL import Image

from ov2_jax.config.data import SourceConfig
from ov2_jax.config.experiment import Experiment
from ov2_jax.config.pack import PackConfig
from ov2_jax.data.encoding.codec import CodecConfig
from ov2_jax.data.encoding.sample_encoder import SampleEncoder
from ov2_jax.data.sources.index import RecordSource
from tests.tiny import PROCESSOR, data_config, tiny_model, tokenizer

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>&amp;"
PACK = PackConfig(rows=2, seq_len=1024, vision_rows=((12, 64), (6, 448)))
CODEC = CodecConfig(
    num_sampled_frames=36, group_size=8, images_per_group=3, max_pixels=14 * 14 * 96
)


def moving(path: Path, frames: int = 48) -> Path:
    """A square that crosses a textured picture: some blocks cost, most do not."""
    still = np.random.default_rng(1).integers(90, 160, (14, 20, 3), np.uint8)
    still = np.asarray(Image.fromarray(still).resize((160, 112), Image.Resampling.BICUBIC))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12, options={"threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 160, 112, "yuv420p"
        for i in range(frames):
            pixels = still.copy()
            pixels[40:72, 2 * i : 2 * i + 32] = (230, 40 + 3 * i, 30)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def experiment(*sources: SourceConfig, pack: PackConfig = PACK, **changes) -> Experiment:
    changes = {"max_pixels": 28 * 28 * 96, "num_frames": 6, "codec": CODEC, **changes}
    return Experiment(
        workdir="unused",
        model=tiny_model(),
        data=data_config(sources=sources, lookahead=16, **changes),
        pack=pack,
        steps=1,
        global_rows=pack.rows,
        tokenizer=str(PROCESSOR / "tokenizer"),
        seed=3,
    )


# --- reading a page ---


class Sample:
    def __init__(self) -> None:
        self.text, self.pieces, self.uris = "", [], []


class Reader(html.parser.HTMLParser):
    """The DOM as far as the tests need it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.samples: dict[int, Sample] = {}
        self.scripts, self.links, self.tags = [], [], []
        self._stack: list[tuple[str, dict]] = []
        self.reasons: dict[str, list[str]] = {}
        self._sample, self._reason = None, None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        name = attrs.get("id", "")
        if name.startswith("sample-"):
            self._sample = self.samples[int(name[7:])] = Sample()
        if name.startswith("reason-"):
            self._sample, self._reason = None, self.reasons.setdefault(name[7:], [])
        if tag == "img" and self._sample and "src" in attrs:
            self._sample.uris.append((attrs["src"], int(attrs["data-t"])))
        for key in ("src", "href"):
            if key in attrs:
                self.links.append(attrs[key])
        if tag == "script":
            self.scripts.append("")
        if tag not in ("img", "meta", "link", "input"):
            self._stack.append((tag, attrs))

    def handle_endtag(self, tag):
        while self._stack and self._stack.pop()[0] != tag:
            pass

    def handle_data(self, data):
        within = [attrs.get("class") for _, attrs in self._stack]
        if self._stack and self._stack[-1][0] == "script":
            self.scripts[-1] += data
        if "seen" in within:
            look = within[within.index("seen") + 1]
            self._sample.pieces.append((look, data))
        if self._reason is not None and self._stack[-1][0] in ("td", "code"):
            self._reason.append(data)


def report(page: str) -> dict:
    return json.loads(Reader(page).scripts[0])


def pixels(uri: str) -> np.ndarray:
    head, data = uri.split(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), np.int16)


def encoded(corpus: Experiment) -> dict:
    encoder = SampleEncoder(corpus.data, corpus.model, tokenizer(), seed=corpus.seed)
    records = RecordSource(corpus.data.sources)
    samples = [encoder(records[i]) for i in range(len(records))]
    return {sample.id: sample for sample in samples}
