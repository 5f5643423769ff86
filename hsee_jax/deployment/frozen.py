"""A device that trains nothing: it sends what an exported segment makes of its samples.

This file runs by itself, with numpy, onnxruntime and grpcio and without this package:

    python frozen.py server.example.org:7443 --keys keys/client-0 --data mine.npz

`hsee export --onnx` copies it into the folder of the segment. It speaks the protocol
of `hsee_jax.deployment.device`. It keeps no state: equal samples give equal messages.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_VERSION = 1  # of the protocol
_TRAIN, _END, _EVALUATE = 1, 2, 3  # what a server asks for; it may also say: wait
_BATCHES = 1  # the stream of the draws of batches, see `hsee_jax.engine.plan`
_CALL_S, _PAUSE_S = 60.0, 2.0
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_KINDS = {"U8": "u1", "I8": "i1", "U16": "u2", "I32": "i4", "F16": "f2", "F32": "f4"}
_DTYPES: dict[str, Any] = {name: np.dtype(kind) for name, kind in _KINDS.items()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Tensors = dict[str, np.ndarray]
Call = Callable[[str, bytes], bytes]  # (method, message) -> the server's answer


class Failure(Exception):
    """The device cannot take part; the text is one line."""


def pack(fields: Mapping[str, int], tensors: Mapping[str, np.ndarray] = {}) -> bytes:
    """Return a message: a line of JSON, then tensors as safetensors."""
    header: dict[str, Any] = {}
    content, end = [], 0
    for name, array in tensors.items():
        data = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": array.shape,
            "data_offsets": (end, end + len(data)),
        }
        content.append(data)
        end += len(data)
    line = json.dumps(dict(fields)).encode() + b"\n"
    if not header:
        return line
    head = json.dumps(header).encode()
    return b"".join([line, len(head).to_bytes(8, "little"), head, *content])


def unpack(message: bytes) -> tuple[dict[str, int], Tensors]:
    """Read a message; the inverse of `pack`."""
    line, _, rest = message.partition(b"\n")
    size = 8 + int.from_bytes(rest[:8], "little")
    tensors = {}
    for name, about in json.loads(rest[8:size] or b"{}").items():
        begin, end = (size + offset for offset in about["data_offsets"])
        array = np.frombuffer(rest[begin:end], _DTYPES[about["dtype"]])
        tensors[name] = array.reshape(about["shape"])
    return json.loads(line), tensors


class Segment:
    """The layers of a client up to its cut, and its exit, from an export."""

    def __init__(self, folder: Path) -> None:
        """Read ``segment.onnx`` and ``card.json``.

        Raises:
          Failure: one of them is missing or not valid.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        try:
            self.card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
            self._session = onnxruntime.InferenceSession(
                (folder / "segment.onnx").read_bytes(),
                options,
                providers=["CPUExecutionProvider"],
            )
        except Exception as error:  # of files, JSON or onnxruntime
            line = str(error).partition("\n")[0]
            raise Failure(f"segment: {folder} cannot be read: {line}") from error
        self._input = self._session.get_inputs()[0].name
        names = [output.name for output in self._session.get_outputs()]
        sent = {name: name for name in names if name.startswith("inputs")}
        self._names = {"logits": "logits"} | (sent or {"inputs": "features"})

    def __call__(self, samples: np.ndarray) -> Tensors:
        """Return the encoded features and the exit's logits of samples ``[b, ...]``."""
        outputs = list(self._names.values())
        arrays = self._session.run(outputs, {self._input: samples})
        return dict(zip(self._names, arrays, strict=True))


class Samples(NamedTuple):
    """The device's own samples."""

    inputs: np.ndarray  # [M, ...], as the segment takes them
    labels: np.ndarray  # int32 [M]


def read_samples(path: Path, card: Mapping[str, Any]) -> Samples:
    """Read an npz with x and y, and check that the segment takes them.

    Raises:
      Failure: it does not.
    """
    try:
        with path.open("rb") as content, np.load(content) as file:
            inputs, labels = file["x"], np.atleast_1d(file["y"])
    except Exception as error:  # NumPy raises many types
        raise Failure(f"data: {path} cannot be read as x and y: {error}") from error
    shape, dtype = tuple(card["input"]["shape"]), card["input"]["dtype"]
    if inputs.shape != (len(labels), *shape) or inputs.dtype != dtype:
        raise Failure(
            f"data: x is {inputs.dtype}{list(inputs.shape)}; allowed is "
            f"{dtype}[{len(labels)}, {', '.join(map(str, shape))}]"
        )
    whole = labels.ndim == 1 and labels.dtype.kind in "iu" and len(labels) > 0
    if not whole or labels.min() < 0 or labels.max() >= card["classes"]:
        raise Failure(f"data: y are not labels in 0..{card['classes'] - 1}")
    return Samples(inputs, labels.astype(np.int32))


class FrozenDevice:
    """Takes part in a run whose devices keep their layers."""

    def __init__(self, segment: Segment, samples: Samples, call: Call) -> None:
        """Join the run.

        Raises:
          Failure: the segment is not made for the run.
        """
        self._segment, self._samples, self._call = segment, samples, call
        self._run = self._join()
        config, card = self._run["config"], segment.card
        for name, own, its in (
            ("cut", card["cut"], self._run["cut"]),
            ("link", card["features"]["link"], config["clients"]["link"]),
            ("network", card["network"], config["model"]["network"]),
        ):
            if own != its:
                raise Failure(f"segment: has {name} {own}; allowed is {its}")
        if not config["clients"].get("keep_layers_private"):
            raise Failure(
                "run: the server asks for layers, which this device does not train; "
                "allowed is a run of `hsee serve --keep-layers-private`"
            )

    def run(self) -> None:
        """Take part until the run ends."""
        while True:
            fields, _ = unpack(self._call("next", pack({"round": 0, "since": 0})))
            if fields["kind"] == _END:
                return
            if fields["kind"] == _TRAIN:
                self._train(fields["round"])
            elif fields["kind"] == _EVALUATE:
                self._evaluate(fields["round"])

    def _join(self) -> dict[str, Any]:
        """Return what the server says of the run."""
        joined = {"samples": len(self._samples.labels), "version": _VERSION}
        return json.loads(self._call("join", pack(joined)))

    def _train(self, number: int) -> None:
        """Send the batches of a round, and the losses of the exit on them."""
        scores = np.zeros((3, self._run["steps"]))
        for step, rows in enumerate(self._batches(number)):
            labels = self._samples.labels[rows]
            sent = self._segment(self._samples.inputs[rows]) | {"labels": labels}
            scores[:, step] = exit_scores(sent.pop("logits"), labels)
            if not self._told("push", sent, round=number, step=step):
                return
        kinds = {"loss_sum": np.float32, "correct": np.int32, "count": np.int32}
        metrics = {
            f"exit.{name}": values.astype(kind)
            for (name, kind), values in zip(kinds.items(), scores, strict=True)
        }
        self._told("finish", metrics, round=number, layers=0)

    def _batches(self, number: int) -> list[np.ndarray]:
        """Return the samples of each batch of a round, as the server expects them."""
        run, size = self._run, self._run["batch_size"]
        key = (run["config"]["run"]["data_seed"], _BATCHES, run["client"], number - 1)
        order = np.random.default_rng(key).permutation(len(self._samples.labels))
        return [order[begin : begin + size] for begin in range(0, len(order), size)]

    def _evaluate(self, number: int) -> None:
        """Send what the segment makes of the server's test inputs."""
        run = self._join()  # a server that goes on may have another batch size
        for step in range(-(-run["test_samples"] // run["test_batch_size"])):
            _, tensors = unpack(self._call("test", pack({"step": step})))
            answers = self._segment(tensors["images"])
            if not self._told("score", answers, round=number, step=step):
                return

    def _told(self, method: str, tensors: Tensors, **fields: int) -> bool:
        """Send a message; return whether the round goes on with this device."""
        return not unpack(self._call(method, pack(fields, tensors)))[0]["closed"]


@np.errstate(invalid="ignore")  # a row that is not finite has a loss of NaN, and no hit
def exit_scores(logits: np.ndarray, labels: np.ndarray) -> tuple[float, int, int]:
    """Return the summed cross-entropy in nats, and the counts of hits and samples."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    own = shifted[np.arange(len(labels)), labels]
    losses = np.log(np.exp(shifted).sum(axis=1)) - own
    hits = np.isfinite(logits).all(axis=1) & (logits.argmax(axis=1) == labels)
    return losses.sum(), hits.sum(), len(labels)


def connect(
    address: str, keys: Path | None, client: int | None, patience_s: float
) -> Call:
    """Return a function that calls a server, and calls again if it was away.

    Raises:
      Failure: the address or the keys are not allowed, or a call has failed for good.
    """
    import grpc

    if (keys is None) == (client is None):
        raise Failure("client: is needed without --keys, and not allowed with it")
    options = [(f"grpc.max_{way}_message_length", -1) for way in ("send", "receive")]
    options.append(("grpc.keepalive_time_ms", 20_000))  # ask if the server is there
    if keys is None:
        if address.rpartition(":")[0] not in _LOOPBACK:
            raise Failure(f"server: {address} is not allowed without --keys")
        channel = grpc.insecure_channel(address, options)
    else:
        files = ("ca.pem", "key.pem", "certificate.pem")
        try:
            pem = [(keys / name).read_bytes() for name in files]
        except OSError as error:
            raise Failure(f"keys: {error}") from error
        secure = grpc.ssl_channel_credentials(*pem)
        channel = grpc.secure_channel(address, secure, options)
    metadata = None if client is None else (("client-id", str(client)),)
    away = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN  # bytes TLS refuses

    def call(method: str, message: bytes) -> bytes:
        function = channel.unary_unary(f"/hsee_jax.Server/{method}")
        begin, seconds = time.monotonic(), _CALL_S
        while True:
            try:
                return function(message, timeout=seconds, metadata=metadata)
            except grpc.RpcError as error:
                code, details = error.code(), error.details()
            if code == grpc.StatusCode.DEADLINE_EXCEEDED:
                begin, seconds = time.monotonic(), 2 * seconds  # it waits, or is slow
            elif code not in away:
                raise Failure(f"server: {address} refuses: {details}")
            elif time.monotonic() - begin > patience_s:
                raise Failure(f"server: {address} does not answer ({details})")
            time.sleep(_PAUSE_S)

    return call


def main(words: list[str] | None = None) -> int:
    """Take part in a run; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("server", metavar="HOST:PORT")
    parser.add_argument("--data", type=Path, required=True, help="npz with x and y")
    parser.add_argument("--keys", type=Path, help="keys/client-ID of hsee enroll")
    parser.add_argument("--client", type=int, help="id of the client, without --keys")
    parser.add_argument("--segment", type=Path, default=Path(__file__).parent)
    parser.add_argument("--patience", type=float, default=600.0, metavar="SECONDS")
    given = parser.parse_args(words)
    try:
        segment = Segment(given.segment)
        samples = read_samples(given.data, segment.card)
        call = connect(given.server, given.keys, given.client, given.patience)
        FrozenDevice(segment, samples, call).run()
    except (Failure, ImportError) as failure:
        print(f"frozen: {failure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("frozen: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
