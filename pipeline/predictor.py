"""Images in, label maps out, with an engine, an ONNX file or a served model: ``from pipeline import Predictor``."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import ModelCard, Profile, TensorSpec, output_kind, sha256_file
from pipeline.backends.base import Runner
from pipeline.backends.distant import DistantModel, DistantRunner, Model
from pipeline.backends.gpu_array import GpuArray, GpuView
from pipeline.backends.lanes import EngineLane, Lane, Lanes
from pipeline.backends.remote import is_address
from pipeline.closing import Closing
from pipeline.data.pixels import Picture, picture_of_array
from pipeline.data.preprocessing import (
    Pixels,
    class_ids,
    class_probabilities,
    fit_image,
    normalise,
    restore_mask,
    restore_planes,
)
from pipeline.data.tiles import Span, padded, spans
from pipeline.errors import ConfigError, DataError, ModelError, UnsupportedError
from pipeline.facts import Facts, facts_of, required_card

log = logging.getLogger(__name__)

# Of models that take any size: the longest side that is fed whole, and the side of tiles above it.
WHOLE, TILE = 2048, 1024
# Images that are fed at once where an engine's profile or a server leaves it free and allows as many.
BATCH = 8
# Batches under way at a time: one is uploaded and one downloaded while a third is computed.
STREAMS = 3

Floats = NDArray[np.float32]
Allocate = Callable[[int, tuple[int, int, int]], Floats]
# Small images that are handed on together, and their pixels, where several batches are under way: an engine needs less
# time for one than threads and processes do to hand it over.
GROUP, GROUP_PIXELS = 8, 1 << 21


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        labels: class ids, uint8 (H, W), of the image's own size.
        probabilities: float32 (classes, H, W), where they were asked for.
    """

    labels: Pixels
    probabilities: Floats | None = None


@dataclass(frozen=True)
class Apart:
    """A predictor but for its model, which stays where it is; to be pickled.

    Attributes:
        model: what is known of it.
        card, batch, tile, overlap: as ``Predictor``'s.
    """

    model: DistantModel
    card: ModelCard
    batch: int
    tile: int | None
    overlap: int | None

    def opened(self, runner: DistantRunner) -> Predictor:
        """A predictor like the one that this was made of, by what stands for its model."""
        return Predictor(runner, self.card, batch=self.batch, tile=self.tile, overlap=self.overlap)


def apart(predictor: Predictor) -> tuple[Apart, Model]:
    """A predictor for other processes, and what answers them here."""

    def freed(spec: TensorSpec) -> TensorSpec:
        return TensorSpec(spec.name, ("batch", *spec.shape[1:]), spec.dtype)

    rows, columns = predictor._axes
    batch = max(predictor.batch, min(GROUP, GROUP_PIXELS // (rows.largest * columns.largest)))
    profiles = {}
    if predictor._profile is not None:
        shapes = predictor._profile.min, predictor._profile.opt, predictor._profile.max
        sizes = ((count, *shape[1:]) for count, shape in zip((1, batch, batch), shapes, strict=True))
        profiles = {predictor._source.name: Profile(*sizes)}
    source, result = (freed(spec) for spec in (predictor._source, predictor._result))
    model = DistantModel((source,), (result,), profiles, predictor._multiples, predictor._aligns_corners)
    return Apart(model, predictor.card, batch, predictor._tile, predictor._overlap), predictor._outputs


def in_memory(_: int, shape: tuple[int, int, int]) -> Floats:
    """Memory for probabilities; as ``allocate`` of ``Predictor.predict``."""
    return np.empty(shape, np.float32)


class Predictor(Closing):
    """A model that is ready for images; a context manager, and safe to use from several threads.

    Pickled, it opens its model's file anew where it is unpickled.

    Images are preprocessed as in training, as the model's card says, and what comes out is of their own size again.
    With ``resize: none``, an image smaller than the network's input is continued by its reflection, and a larger one
    predicted in overlapping tiles whose scores are blended; of label maps that a graph decides on itself, each tile
    gives its inner part.

    Args:
        model: an ``.onnx`` file, for ONNX Runtime; an engine, whose manifest is checked;
            ``grpc://HOST:PORT/MODEL[/VERSION]`` or ``http://`` for a model on an inference server; or a loaded model,
            which is closed with the predictor.
        card: what to know of a model that does not say it: a ``ModelCard``, or an ONNX file, engine or manifest that
            holds one.
        trust: load an engine although its manifest is missing or does not match.
        batch: images, or tiles, that are fed at once; a fixed batch of the model's goes before. Default: what an
            engine's profile or a server allows, up to 8; 1 on ONNX Runtime.
        tile: longest side, in pixels, that a model of free sizes is fed; default: 2048 for whole images and 1024 for
            tiles of larger ones, or what an engine's profile allows.
        overlap: pixels that neighbouring tiles share; default: 128, or a quarter of a smaller tile.
        streams: batches that an engine works on at a time, each on a stream, an execution context and memory of its
            own, which are made when they are first wanted; fewer where GPU memory does not suffice. Or requests that
            a server is sent at a time, each on a connection of its own. Default: 3.

    Attributes:
        card: names of classes, colours, preprocessing.
        batch: see above.
        sha256: of the model's file, read when it is first asked for; empty for a loaded model.
        streams: see above; 1 on ONNX Runtime.

    Raises:
        ModelError, EngineError, UnsupportedError: the model cannot be loaded, or is no segmentation network.
        ServerError: the server cannot be reached, or does not have the model ready.
        ConfigError: impossible sizes.
    """

    def __init__(
        self,
        model: Path | str | Runner,
        card: ModelCard | Path | str | None = None,
        *,
        trust: bool = False,
        batch: int | None = None,
        tile: int | None = None,
        overlap: int | None = None,
        streams: int | None = None,
    ) -> None:
        self._again = partial(
            Predictor, model, card, trust=trust, batch=batch, tile=tile, overlap=overlap, streams=streams
        )
        given = card if isinstance(card, ModelCard) or card is None else _card_of(Path(card))
        runner, facts = _opened(model, trust) if isinstance(model, (str, Path)) else (model, facts_of(model))
        try:
            if streams is not None and streams < 1:
                raise ConfigError(f"{streams} streams", expected="1 or more")
            self.card = required_card(given or facts.card, model)
            if self.card.task != "segmentation":
                raise ModelError(
                    f"{model} gives tensors and no masks",
                    expected="a model exported with task: segmentation",
                    fix="run it with TensorRT, ONNX Runtime or Polygraphy, and decode what it gives",
                )
            self._source, result = _one(runner, model)
            self._kind = output_kind(result)
            profile = getattr(runner, "profiles", {}).get(self._source.name)
            self._least_batch, self.batch = _batch_sizes(self._source, profile, batch)
            self._axes = _axes(self._source, profile, facts.multiples, tile)
            self._result, self._profile, self._multiples = result, profile, facts.multiples
            self._tile, self._overlap = tile, overlap
            for axis in self._axes:
                _check_overlap(axis.tile, overlap)
        except BaseException:
            runner.close()
            raise
        self._file = Path(model) if isinstance(model, (str, Path)) and not is_address(model) else None
        self._served_sha256 = facts.sha256
        self._aligns_corners = facts.aligns_corners
        self._lanes = Lanes(runner, streams or STREAMS)
        self.streams = self._lanes.most

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return self._again, ()

    @cached_property
    def sha256(self) -> str:
        return sha256_file(self._file) if self._file else self._served_sha256

    def __call__(self, image: Any) -> Pixels:
        """Class ids, uint8 (H, W), of one image; see ``predict``."""
        return self.predict([image])[0].labels

    def predict(
        self,
        images: Sequence[Any],
        *,
        probabilities: bool = False,
        allocate: Allocate = in_memory,
    ) -> list[Prediction]:
        """Predict images of any sizes; those that the network sees at one size share batches.

        Args:
            images: each a ``Picture``, or grey (H, W), RGB or RGBA (H, W, C), uint8 or uint16, as an array or whatever
                numpy takes or offers DLPack.
            probabilities: give them too.
            allocate: gives the memory for the probabilities, by an image's index and (classes, H, W); default: numpy's.

        Raises:
            DataError: what is given is no image, or with ``resize: none`` none that the model takes.
            ModelError: the model fails, gives a class that its card does not name, or gives no probabilities.
            EngineError: the engine or the GPU fails, or the GPU is out of memory.
            ServerError: the server refuses, does not answer in time, or answers nonsense.
            UnsupportedError: the computer is out of memory.
            ValueError: the predictor is closed.
        """
        channels = self.card.preprocessing.channels
        pictures = [one if isinstance(one, Picture) else picture_of_array(one, channels) for one in images]
        if probabilities and self._kind == "labels":
            raise ModelError(
                "this model gives labels alone",
                expected="logits or probabilities",
                fix="clean it with --bake-output probabilities or logits, and build it again",
            )

        results: list[Prediction] = []
        try:
            for index, picture in enumerate(pictures):
                shape = picture.height, picture.width
                planes = allocate(index, (len(self.card.classes), *shape)) if probabilities else None
                results.append(Prediction(np.empty(shape, np.uint8), planes))
            self._predict(pictures, results)
        except MemoryError as error:
            largest = max(pictures, key=lambda one: one.height * one.width)
            raise UnsupportedError(
                f"there is not enough memory for an image of {largest.width}×{largest.height}",
                fix="use smaller tiles (--tile) or batches (--batch)",
            ) from error
        return results

    def predict_on_gpu(self, images: Any) -> GpuArray:
        """Predict a batch that lies in GPU memory; images and result never pass through the computer's own.

        It returns when the result is there. What still writes to the images, on a stream of the producer's, is waited
        for on the GPU.

        Args:
            images: uint8 (N, H, W, C), C-contiguous, on this process's current GPU: of the size that the network sees,
                with its channels in its order (``card.preprocessing.channels``). Anything that offers DLPack, as
                tensors of torch, CuPy and JAX do, or version 3 of the CUDA array interface. N is free.

        Returns:
            The network's output, which offers both and outlives the predictor: labels, uint8 (N, H, W), unchecked,
            where the graph decides (``clean.output: labels``); else logits or probabilities, (N, classes, H, W).

        Raises:
            DataError: the images are not on the GPU, or not of this shape, type and layout.
            ModelError: the model is no engine, or takes no uint8 images (``clean.input: image``).
            EngineError: the engine or the GPU fails, or the GPU is out of memory.
            ValueError: the predictor is closed.
        """
        if self._source.dtype != "uint8":
            raise ModelError(
                f"this model takes {self._source.dtype} tensors that were normalised on the host",
                expected="a model that takes uint8 images",
                fix="clean it with --bake-input image (clean.input: image), and build it again; or use predict",
            )
        lane = self._lanes.take(wait=True)
        assert lane is not None
        try:
            if not isinstance(lane, EngineLane):
                raise ModelError(
                    "this model does not work on memory of the GPU",
                    expected="an engine",
                    fix="build one; or use predict",
                )
            given = lane.view(images)
            self._check_on_gpu(given)
            with self._misfits():
                return lane.on_gpu(given, max(min(given.shape[0], self.batch), self._least_batch))
        finally:
            lane.settle()
            self._lanes.give(lane)

    def close(self) -> None:
        """Release the model and all memory; what other threads are predicting keeps its part until it is done.

        Calling it again does nothing.
        """
        self._lanes.close()

    # ------------------------------------------------------------------ images

    def _predict(self, pictures: Sequence[Picture], results: Sequence[Prediction]) -> None:
        whole: list[int] = []
        for index, (picture, result) in enumerate(zip(pictures, results, strict=True)):
            if self._fits(picture.height, picture.width):
                whole.append(index)
            else:
                self._tiled(picture, result)
        # What is fed at one size shares batches.
        whole.sort(key=lambda index: self._fed(pictures[index].height, pictures[index].width))
        patches = (self._patch(pictures[index]) for index in whole)
        with closing(self._outputs(patches)) as outputs:
            for index, output in zip(whole, outputs, strict=True):
                self._keep(output, results[index])

    def _fits(self, height: int, width: int) -> bool:
        if self.card.preprocessing.resize != "none":
            return True
        return height <= self._axes[0].largest and width <= self._axes[1].largest

    def _fed(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image of this size is fed at as a whole."""
        spec = self.card.preprocessing
        if spec.resize != "none":
            return spec.height, spec.width
        return self._axes[0].fed(height), self._axes[1].fed(width)

    def _patch(self, picture: Picture) -> Pixels:
        fed = self._fed(picture.height, picture.width)
        return padded(fit_image(picture.pixels, self.card.preprocessing), *fed)

    def _check_on_gpu(self, images: GpuView) -> None:
        """Raise DataError where they are not what the network takes, as they are."""
        spec, shape = self.card.preprocessing, images.shape
        channels = 1 if spec.channels == "grey" else 3
        known = images.dtype == "uint8" and len(shape) == 4 and shape[0] > 0 and shape[3] == channels
        if not known or not self._fits(*shape[1:3]) or self._fed(*shape[1:3]) != shape[1:3]:
            height, width = (spec.height, spec.width) if spec.resize != "none" else map(str, self._axes)
            raise DataError(
                "these images are not as the network takes them, and on the GPU nothing is converted or resized",
                expected=f"uint8 (N, {height}, {width}, {channels}), channels in the order {spec.channels}",
                got=f"{images.dtype} {shape}",
                fix="convert them there, as .permute(0, 2, 3, 1).contiguous() does with (N, C, H, W); or use predict",
            )

    def _keep(self, output: NDArray[Any], result: Prediction) -> None:
        """Write what the network gave for a whole image."""
        spec, (height, width) = self.card.preprocessing, result.labels.shape
        result.labels[:] = restore_mask(self._decided(output), spec, height, width)
        if result.probabilities is not None:
            result.probabilities[:] = restore_planes(self._probabilities(output), spec, height, width)

    # ------------------------------------------------------------------ tiles

    def _tiled(self, picture: Picture, result: Prediction) -> None:
        """Tile by tile, a row of them at a time; the scores of as many image rows as a tile has are kept."""
        rows, columns = (
            spans(size, axis.largest if size <= axis.largest else axis.tile, self._overlap)
            for size, axis in zip((picture.height, picture.width), self._axes, strict=True)
        )
        log.debug("%d×%d tiles for an image of %d×%d", len(rows), len(columns), picture.height, picture.width)
        self._warn_of_tiles()
        with closing(self._outputs(self._tiles(picture, rows, columns))) as outputs:
            if self._kind == "labels":
                for row, column in product(rows, columns):
                    inner = (
                        slice(row.first - row.start, row.last - row.start),
                        slice(column.first - column.start, column.last - column.start),
                    )
                    labels = self._decided(next(outputs))[inner]
                    result.labels[row.first : row.last, column.first : column.last] = labels
            else:
                self._blend(outputs, rows, columns, result)

    def _blend(
        self, outputs: Iterator[NDArray[Any]], rows: Sequence[Span], columns: Sequence[Span], result: Prediction
    ) -> None:
        """Add up the weighted scores of tiles, and decide on rows of the image as soon as they are complete."""
        width = result.labels.shape[1]
        kept = np.zeros((len(self.card.classes), max(row.stop - row.start for row in rows), width), np.float32)
        for index, row in enumerate(rows):
            height = row.stop - row.start
            for column in columns:
                weights = row.weights[:, np.newaxis] * column.weights
                scores = next(outputs)[:, :height, : column.stop - column.start]
                kept[:, :height, column.start : column.stop] += scores * weights
            final = (rows[index + 1].start if index + 1 < len(rows) else row.stop) - row.start
            done = slice(row.start, row.start + final)
            result.labels[done] = self._decided(kept[:, :final])
            if result.probabilities is not None:
                result.probabilities[:, done] = self._probabilities(kept[:, :final])
            kept[:, : kept.shape[1] - final] = kept[:, final:].copy()
            kept[:, kept.shape[1] - final :] = 0

    def _tiles(self, picture: Picture, rows: Sequence[Span], columns: Sequence[Span]) -> Iterator[Pixels]:
        for row in rows:
            band = picture.rows(row.start, row.stop)
            height = self._axes[0].fed(row.stop - row.start)
            for column in columns:
                width = self._axes[1].fed(column.stop - column.start)
                yield padded(band[:, column.start : column.stop], height, width)

    def _warn_of_tiles(self) -> None:
        if self._aligns_corners:
            self._aligns_corners = False  # said once
            log.warning(
                "this network upsamples with align_corners, so what it sees depends on the size that it is fed: masks "
                "made of tiles differ from a whole image's, by about 1 %% of the pixels (docs/predicting.md)"
            )

    # ------------------------------------------------------------------ the network

    def _outputs(self, patches: Iterable[NDArray[Any]]) -> Generator[NDArray[Any], None, None]:
        """What the network gives for images of the size that it is fed, uint8 (H, W, C), or for its own inputs,
        normalised (C, H, W), one after another; each is valid until the next.

        Batches are sent off before the results of those ahead of them are asked for, on as many lanes as are free.
        """
        under_way: deque[tuple[Lane, int]] = deque()
        try:
            for batch in self._batches(patches):
                lane = self._lanes.take(wait=not under_way)
                if lane is None:
                    lane, count = under_way[0]
                    yield from self._answers(lane, count)
                    under_way.popleft()
                under_way.append((lane, len(batch)))
                self._send(lane, batch)
            while under_way:
                lane, count = under_way[0]
                yield from self._answers(lane, count)
                under_way.popleft()
                self._lanes.give(lane)
        finally:
            for lane, _ in under_way:
                lane.settle()
                self._lanes.give(lane)

    def _batches(self, patches: Iterable[NDArray[Any]]) -> Iterator[list[NDArray[Any]]]:
        """Neighbours of one size; at most as many as a batch holds."""
        batch: list[NDArray[Any]] = []
        for patch in patches:
            if batch and (len(batch) == self.batch or batch[0].shape != patch.shape):
                yield batch
                batch = []
            batch.append(patch)
        if batch:
            yield batch

    def _send(self, lane: Lane, batch: Sequence[NDArray[Any]]) -> None:
        is_ready = batch[0].dtype == self._source.dtype
        count = max(len(batch), self._least_batch)
        shape = (count, *(batch[0].shape if is_ready else (batch[0].shape[2], *batch[0].shape[:2])))
        with self._misfits():
            memory = lane.memory(shape)
            for index in range(count):
                patch = batch[min(index, len(batch) - 1)]
                if is_ready:
                    memory[index] = patch
                else:
                    normalise(patch, self.card.preprocessing, memory[index])
            lane.start()

    @contextmanager
    def _misfits(self) -> Iterator[None]:
        """What a model says of shapes and types, as the project's own error."""
        try:
            yield
        except ValueError as error:
            raise ModelError(
                f"the model does not take these images: {error}",
                expected=f"what its card says: {self.card.preprocessing}",
                fix="export it again with the preprocessing that it was trained with",
            ) from error

    def _answers(self, lane: Lane, count: int) -> NDArray[Any]:
        """The outputs of a lane's batch, but for those of images that only filled it up."""
        # Where several batches are under way the GPU goes on with another while a thread wakes up, and the cores have
        # images to decode.
        result = lane.finish(sleeps=self._lanes.lent > 1)[:count]
        if self._kind != "labels" and result.shape[1] != len(self.card.classes):
            raise ModelError(
                f"the model scores {result.shape[1]} classes, and its card names {len(self.card.classes)}",
                fix="export and build the model again with the data.classes that it was trained for",
            )
        return result

    def _decided(self, output: NDArray[Any]) -> NDArray[np.integer]:
        return class_ids(output[np.newaxis], len(self.card.classes))

    def _probabilities(self, output: NDArray[Any]) -> Floats:
        return class_probabilities(output) if self._kind == "logits" else output.astype(np.float32, copy=False)


@dataclass(frozen=True)
class _Axis:
    """Sizes that a network takes along one axis.

    Attributes:
        smallest: that it takes.
        multiple: that every size has to be of.
        largest: that is fed whole.
        tile: that larger ones are cut into.
    """

    smallest: int
    multiple: int
    largest: int
    tile: int

    def fed(self, size: int) -> int:
        """The size that an image or tile is continued to."""
        return max(self.smallest, -(-size // self.multiple) * self.multiple)

    def __str__(self) -> str:
        if self.smallest == self.largest:
            return str(self.largest)
        return f"{self.smallest}…{self.largest}" + (f" by {self.multiple}" if self.multiple > 1 else "")


def _axes(
    source: TensorSpec, profile: Profile | None, multiples: Mapping[str, int], tile: int | None
) -> tuple[_Axis, _Axis]:
    """Those of height and width.

    Args:
        multiples: as in ``pipeline.facts.Facts``.
    """
    if tile is not None and tile < 1:
        raise ConfigError(f"tiles of {tile} pixels", expected="1 or more")

    def axis(role: str, place: int) -> _Axis:
        size = source.shape[place]
        if isinstance(size, int):
            return _Axis(size, 1, size, size)
        multiple = multiples.get(size, multiples.get(role, 1))
        low, high = (profile.min[place], profile.max[place]) if profile else (1, None)

        def allowed(wanted: int) -> int:
            most = wanted if high is None else min(wanted, high)
            return max(low, multiple, most // multiple * multiple)

        return _Axis(-(-low // multiple) * multiple, multiple, allowed(tile or WHOLE), allowed(tile or TILE))

    first = 1 if source.dtype == "uint8" else 2
    return axis("height", first), axis("width", first + 1)


def _batch_sizes(source: TensorSpec, profile: Profile | None, wanted: int | None) -> tuple[int, int]:
    """The smallest batch that the model takes, and the one to use."""
    if wanted is not None and wanted < 1:
        raise ConfigError(f"a batch of {wanted} images", expected="1 or more")
    fixed = source.shape[0]
    if isinstance(fixed, int):
        return fixed, fixed
    if profile is None:
        return 1, wanted or 1
    return profile.min[0], max(profile.min[0], min(wanted or BATCH, profile.max[0]))


# What opens files is loaded where there is one: processes whose model is elsewhere start in half the time without it.


def _card_of(path: Path) -> ModelCard | None:
    from pipeline.opening import read_facts

    return read_facts(path).card


def _opened(path: Path | str, trust: bool) -> tuple[Runner, Facts]:
    from pipeline.opening import open_model

    return open_model(path, trust=trust)


def _check_overlap(tile: int, overlap: int | None) -> None:
    try:
        spans(tile + 1, tile, overlap)
    except ValueError as error:
        raise ConfigError(str(error), expected=f"0…{tile - 1}", fix="choose a smaller --overlap") from error


def _one(runner: Runner, model: object) -> tuple[TensorSpec, TensorSpec]:
    if len(runner.inputs) != 1 or len(runner.outputs) != 1 or len(runner.inputs[0].shape) != 4:
        raise ModelError(
            f"{model} is no segmentation network",
            expected="one input of images, (N, C, H, W) or (N, H, W, C), and one output",
            got=f"inputs {[spec.name for spec in runner.inputs]}, outputs {[spec.name for spec in runner.outputs]}",
        )
    return runner.inputs[0], runner.outputs[0]
