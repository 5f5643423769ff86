"""The user's own pictures, in folders and in Parquet files, against Pillow."""

import io
import json
import shutil
import struct
import sys
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import hsee_jax as hs
from hsee_jax import cli
from hsee_jax.core.errors import UserError
from hsee_jax.data import load_dataset, read_dataset
from hsee_jax.data.split import set_apart

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

NAMES = ("top", "trouser", "pullover", "dress", "coat")


@pytest.fixture(scope="module")
def packaged():
    """Images [M, 28, 28] and labels of five classes, for training and test."""
    train, test = load_dataset("fashion_mnist_small", max_train=200, max_test=60)
    return [
        (s.images[s.labels < 5, ..., 0], s.labels[s.labels < 5]) for s in (train, test)
    ]


def write_pictures(folder, images, labels, kind="png"):
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = folder / NAMES[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number:04}.{kind}")


def pairs(images, labels):
    """How often each image has each label, whatever the order."""
    return Counter(
        (image.tobytes(), label) for image, label in zip(images, labels, strict=True)
    )


def named(info, labels):
    return [info.label_values[label] for label in labels]


def test_folders_of_training_and_test(packaged, tmp_path, said):
    for split, (images, labels) in zip(("train", "test"), packaged, strict=True):
        write_pictures(tmp_path / split, images, labels)
    (tmp_path / "train" / "coat" / "Thumbs.db").write_text("no picture")
    (tmp_path / "train" / ".hidden").mkdir()
    data = read_dataset("imagefolder", folder=tmp_path)
    assert data.info.label_values == tuple(sorted(NAMES))
    assert data.info.input_shape == (28, 28, 1)
    for found, (images, labels) in zip(data[:2], packaged, strict=True):
        assert (found.images.dtype, found.labels.dtype) == (np.uint8, np.int32)
        names = [NAMES[label] for label in labels]
        assert pairs(found.images, named(data.info, found.labels)) == pairs(
            images, names
        )
        assert len(set(found.labels[:20].tolist())) > 2  # not class by class
    pixels = packaged[0][0] / 255
    np.testing.assert_allclose(data.info.mean, [pixels.mean()], rtol=1e-9)
    np.testing.assert_allclose(data.info.std, [pixels.std()], rtol=1e-9)
    [line] = said()
    assert f"imagefolder: {len(packaged[0][1])} training and" in line
    assert "in 5 classes (labels coat to trouser, ascending)" in line
    assert f"test set from {tmp_path / 'test'}" in line


def test_linked_folders_are_read_and_links_back_are_not(packaged, tmp_path):
    images, labels = packaged[1]
    write_pictures(tmp_path / "own", images, labels)
    write_pictures(tmp_path / "other", images, labels)
    (tmp_path / "own/coat/more").symlink_to(tmp_path / "other/coat")
    (tmp_path / "own/coat/back").symlink_to(tmp_path / "own")
    data = read_dataset("imagefolder", folder=tmp_path / "own")
    coats = sum(NAMES[label] == "coat" for label in labels)
    found = len(data.train.labels) + len(data.test.labels)
    assert 0 < coats
    assert found == len(labels) + coats


@pytest.mark.parametrize(
    "names", [("Train", "Test"), ("Training", "Testing"), ("TRAIN", "Validation")]
)
def test_other_names_of_the_splits(names, packaged, tmp_path, said):
    for split, (images, labels) in zip(names, packaged, strict=True):
        write_pictures(tmp_path / split, images, labels)
    write_pictures(tmp_path / "val2", *packaged[1])
    data = read_dataset("imagefolder", folder=tmp_path)
    assert data.info.label_values == tuple(sorted(NAMES))
    for found, (_, labels) in zip(data[:2], packaged, strict=True):
        assert len(found.labels) == len(labels)
    assert f"test set from {tmp_path / names[1]} (val2 not read)" in said()[0]


def test_hidden_folders_of_a_class_are_passed_over(packaged, tmp_path):
    images, labels = packaged[1]
    write_pictures(tmp_path, images, labels)
    for name in (".ipynb_checkpoints", "__MACOSX", "more/.thumbs"):
        place = tmp_path / "coat" / name
        place.mkdir(parents=True)
        Image.fromarray(images[0]).save(place / "0.png")
    data = read_dataset("imagefolder", folder=tmp_path)
    assert len(data.train.labels) + len(data.test.labels) == len(labels)


def test_a_test_set_is_set_apart(packaged, tmp_path, said):
    images, labels = packaged[0]
    write_pictures(tmp_path, images, labels, kind="PNG")
    one = read_dataset("imagefolder", folder=tmp_path)
    again = read_dataset("imagefolder", folder=tmp_path, test_share=0.2, split_seed=0)
    other = read_dataset("imagefolder", folder=tmp_path, split_seed=1)
    half = read_dataset("imagefolder", folder=tmp_path, test_share=0.5)
    names = [NAMES[label] for label in labels]
    for data in (one, other, half):
        everything = [np.concatenate(arrays) for arrays in zip(*data[:2], strict=True)]
        found = pairs(everything[0], named(data.info, everything[1]))
        assert found == pairs(images, names)
    np.testing.assert_array_equal(one.test.images, again.test.images)
    assert not np.array_equal(one.test.images, other.test.images)
    totals = Counter(names)
    for data, share in ((one, 0.2), (half, 0.5)):
        counts = Counter(named(data.info, data.test.labels))
        assert counts == {name: round(share * n) for name, n in totals.items()}
    assert "; 20% of each class set apart as the test set (seed 0)" in said()[0]


def test_every_class_is_in_both_splits():
    labels = np.array(["a"] * 2 + ["b"] * 99 + ["c"])
    train, test = set_apart(labels, 0.01, seed=3)
    assert sorted([*train, *test]) == list(range(102))
    assert Counter(labels[test].tolist()) == {"a": 1, "b": 1}
    train, _ = set_apart(labels, 0.999, seed=3)
    assert set(labels[train]) == {"a", "b", "c"}


def test_grey_colour_palette_and_transparency(tmp_path, said):
    """Each becomes what Pillow makes of it, and the line says so."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (6, 5, 4), np.uint8), "RGBA")
    pictures = {
        "colour.png": colour.convert("RGB"),
        "clear.png": colour,
        "palette.png": colour.convert("RGB").convert("P"),
        "grey.png": colour.convert("L"),
        "grey clear.png": colour.convert("LA"),
        "bits.png": colour.convert("1"),
        "print.jpg": colour.convert("CMYK"),
    }
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    for file, picture in pictures.items():
        options = {"transparency": 3} if file == "palette.png" else {}
        picture.save(tmp_path / "one" / file, **options)
        picture.save(tmp_path / "two" / file, **options)
    data = read_dataset("imagefolder", folder=tmp_path, test_share=0.5)
    expected = [
        np.asarray(Image.open(tmp_path / "one" / file).convert("RGBA"))[..., :3]
        for file in pictures
    ]
    everything = np.concatenate([data.train.images, data.test.images])
    found = Counter(image.tobytes() for image in everything)
    assert found == Counter(image.tobytes() for image in expected * 2)
    [line] = said()
    for clause in (
        "6 images grey, turned to RGB",
        "2 images with a palette, turned to RGB",
        "6 images transparent, made opaque",
        "2 images CMYK, turned to RGB",
    ):
        assert clause in line


def test_sizes(packaged, tmp_path, said):
    images, labels = packaged[0]
    write_pictures(tmp_path, images[:40], labels[:40])
    odd = tmp_path / "top" / "zz.png"
    Image.fromarray(images[0][:20]).save(odd)
    with pytest.raises(UserError) as error:
        load_dataset("imagefolder", folder=tmp_path)
    assert "28x28 pixels and" in str(error.value) or "28x20 pixels and" in str(
        error.value
    )
    assert "--image-size 2" in str(error.value)
    data = read_dataset("imagefolder", folder=tmp_path, image_size=16)
    everything = np.concatenate([data.train.images, data.test.images])
    assert everything.shape == (41, 16, 16, 1)
    resized = Image.open(odd).resize((16, 16), Image.Resampling.BILINEAR)
    assert any(np.array_equal(image[..., 0], resized) for image in everything)
    assert "; all images resized to 16x16" in said()[-1]


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-30])


def sixteen_bits(path):
    Image.fromarray(np.zeros((28, 28), np.uint16)).save(path)


def sixteen_bits_of_colours(path):
    """A PNG of 16 bits a channel, which Pillow can read and not write."""

    def chunk(name, content):
        size, code = len(content), zlib.crc32(name + content)
        return struct.pack(">I", size) + name + content + struct.pack(">I", code)

    rows = (b"\0" + bytes(28 * 6)) * 28
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 28, 28, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def of_kind(kind):
    return lambda path: Image.fromarray(np.zeros((28, 28), np.uint8)).save(path, kind)


FAULTS = {
    "cut short": ("train/a/0.png", cut_short, "0.png cannot be read as an image ("),
    "text": ("train/a/0.png", lambda p: p.write_text("x"), "0.png cannot be read as"),
    "16 bits": ("train/a/0.png", sixteen_bits, "more than 8 bits per pixel"),
    "16 bits a colour": (
        "train/a/0.png",
        sixteen_bits_of_colours,
        "more than 8 bits per pixel",
    ),
    "no picture": (
        "train/a",
        lambda p: [f.unlink() for f in p.iterdir()],
        "a holds no",
    ),
    "test alone": ("test/a", lambda p: p.rename(p.with_name("x")), "holds the label x"),
    "one class": (
        "train/b",
        lambda p: p.rename(p.parents[1] / "b"),
        "2 classes or more",
    ),
    "no training": (
        "train",
        lambda p: p.rename(p.parents[1] / "elsewhere"),
        "holds test, but no train; allowed are train/CLASS/ and test/CLASS/",
    ),
    "two names": (
        "train",
        lambda p: shutil.copytree(p, p.with_name("training")),
        "holds train and training; allowed is one",
    ),
    "one picture a class": (
        "train",
        lambda p: (
            shutil.rmtree(p.with_name("test")),
            [file.unlink() for file in p.glob("*/1.png")],
        ),
        "no class has 2 samples",
    ),
    "GIF": ("train/a/0.png", of_kind("GIF"), "content is neither PNG nor JPEG"),
    "EPS": ("train/a/0.png", of_kind("EPS"), "content is neither PNG nor JPEG"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_folder_is_one_line(fault, tmp_path, capsys):
    place, break_it, message = FAULTS[fault]
    root = tmp_path / "root"
    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(2):
                image = np.full((28, 28), 9 * number, np.uint8)
                Image.fromarray(image).save(folder / f"{number}.png")
    break_it(root / place)
    words = ["train", "--dataset", "imagefolder", "--data-dir", str(root)]
    assert cli.main([*words, "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--test-share", "0.3"], "test_share: 0.3 has no effect, as"),
        (["--test-share", "1.5"], "test_share: 1.5 is not allowed"),
        (["--image-size", "0"], "image_size: 0 is not allowed; allowed is 1..10000"),
        (["--labels", "remap"], "labels: remap has no effect on dataset imagefolder"),
    ],
)
def test_an_option_of_a_folder_is_checked(words, message, packaged, tmp_path, capsys):
    for split in ("train", "test"):
        write_pictures(tmp_path / split, packaged[1][0], packaged[1][1])
    command = ["info", "--dataset", "imagefolder", "--data-dir", str(tmp_path), *words]
    assert cli.main(command) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_no_folder(tmp_path, capsys):
    assert cli.main(["data", "imagefolder", "--data-dir", str(tmp_path / "no")]) == 2
    assert "allowed is a folder with train/CLASS/ and test/CLASS/" in (
        capsys.readouterr().err
    )


RUN = (
    "--network tiny --plugin tiny --num-clients 2 --cuts 1 2 --rounds 1 --batch-size 8 "
    "--validation-share 0.2"
).split()


@pytest.mark.slow
def test_a_run_on_folders(packaged, tmp_path, capsys, said):
    """Trained, restored, evaluated, gated and exported, with the names of classes."""
    data, run = tmp_path / "data", tmp_path / "run"
    write_pictures(data, *packaged[0])
    words = ["--dataset", "imagefolder", "--data-dir", str(data), "--image-size", "14"]
    assert cli.main(["train", *words, *RUN, "--out", str(run)]) == 0
    restored = hs.restore(run)
    assert restored.info.label_values == tuple(sorted(NAMES))
    assert restored.info.input_shape == (14, 14, 1)
    capsys.readouterr()
    assert cli.main(["eval", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    summary = json.loads((run / "summary.json").read_text())
    assert found["mean_server_accuracy"] == summary["mean_server_accuracy"]
    assert cli.main(["gate", str(run), "--target-offload", "0.5"]) == 0
    assert cli.main(["export", str(run), "--client", "0"]) == 0
    card = json.loads((run / "export" / "client-0" / "card.json").read_text())
    assert card["label_values"] == sorted(NAMES)
    config = json.loads((run / "config.json").read_text())["data"]
    assert (config["image_size"], config["split_seed"]) == (14, 0)
    (data / "coat").rename(data / "cloak")
    capsys.readouterr()
    assert cli.main(["eval", str(run)]) == 2
    assert "label_values ('cloak', 'dress'" in capsys.readouterr().err


def encoded(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def write_parquet(path, images, labels, *, struct=True, **more):
    """Write a table as the Hub does; ``more`` are further columns."""
    content = [encoded(image) for image in images]
    if struct:
        content = [{"bytes": b, "path": f"{k}.png"} for k, b in enumerate(content)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"img": content, "label": labels, **more}), path)


@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("place", ["", "data"])
def test_parquet_files(struct, place, packaged, tmp_path, said):
    """In several pieces, with integers for labels; the test split is its own."""
    (images, labels), (test_images, test_labels) = packaged
    folder = tmp_path / place
    for part, rows in enumerate((slice(0, 50), slice(50, None))):
        name = f"train-0000{part}-of-00002.parquet"
        write_parquet(folder / name, images[rows], labels[rows], struct=struct)
    write_parquet(
        folder / "test-00000-of-00001.parquet", test_images, test_labels, struct=struct
    )
    data = read_dataset("parquet", folder=tmp_path)
    assert data.info.label_values is None
    for found, (images, labels) in zip(data[:2], packaged, strict=True):
        assert pairs(found.images, found.labels.tolist()) == pairs(
            images, labels.tolist()
        )
    assert "from 3 Parquet files in" in said()[0]


@pytest.mark.parametrize(
    "names", [("Train", "Test"), ("train-0", "dev-0"), ("TRAIN", "valid")]
)
def test_other_names_of_parquet_files(names, packaged, tmp_path, said):
    for name, (images, labels) in zip(names, packaged, strict=True):
        write_parquet(tmp_path / f"{name}.parquet", images, labels)
    write_parquet(tmp_path / "more.parquet", *packaged[1])
    data = read_dataset("parquet", folder=tmp_path)
    for found, (_, labels) in zip(data[:2], packaged, strict=True):
        assert len(found.labels) == len(labels)
    assert "from 2 Parquet files in" in said()[0]
    assert "(more.parquet not read)" in said()[0]


@pytest.mark.parametrize(
    "names",
    [
        ("test", "val"),
        ("mnist-train", "mnist-test"),
        ("fashionTrain", "fashionTest"),
        ("all", "testset"),
        ("all", "VALSET2"),
    ],
)
def test_parquet_files_of_a_test_set_alone(names, packaged, tmp_path):
    for name in names:
        write_parquet(tmp_path / f"{name}.parquet", *packaged[1])
    wanted = r"(?i)(test|set2?).parquet, but no train\*.parquet"
    with pytest.raises(UserError, match=wanted):
        load_dataset("parquet", folder=tmp_path)


def test_parquet_files_whose_words_only_resemble_a_split(packaged, tmp_path):
    for name in ("latest", "values", "contestants"):
        write_parquet(tmp_path / f"{name}.parquet", *packaged[1])
    data = read_dataset("parquet", folder=tmp_path)
    assert len(data.train.labels) + len(data.test.labels) == 3 * len(packaged[1][1])


@pytest.mark.parametrize("other", ["train-1", "test"])
def test_integers_and_text_are_not_joined(other, packaged, tmp_path):
    images, labels = packaged[1]
    write_parquet(tmp_path / "train-0.parquet", images, labels)
    write_parquet(tmp_path / f"{other}.parquet", images, labels.astype(str))
    with pytest.raises(UserError, match="labels of integers in some files and of text"):
        load_dataset("parquet", folder=tmp_path)


@pytest.mark.parametrize("content", ["path", 3])
def test_bytes_of_another_type_are_no_picture(content, packaged, tmp_path):
    """A path in the place of bytes would open that file."""
    picture = tmp_path / "secret.png"
    Image.fromarray(packaged[1][0][0]).save(picture)
    value = str(picture) if content == "path" else content
    table = {"img": [{"bytes": value}] * 4, "label": [0, 1, 0, 1]}
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    with pytest.raises(UserError, match="holds 0 columns of pictures among img, label"):
        load_dataset("parquet", folder=tmp_path)


def test_a_single_parquet_file_with_text_for_labels(packaged, tmp_path):
    images, labels = packaged[0]
    names = [NAMES[label] for label in labels]
    write_parquet(tmp_path / "all.parquet", images, names, number=list(labels))
    data = read_dataset("parquet", folder=tmp_path, test_share=0.5)
    assert data.info.label_values == tuple(sorted(NAMES))
    everything = [np.concatenate(arrays) for arrays in zip(*data[:2], strict=True)]
    assert pairs(everything[0], named(data.info, everything[1])) == pairs(images, names)
    other = read_dataset("parquet", folder=tmp_path, label_column="number")
    assert other.info.label_values is None


def test_integers_of_parquet_are_remapped(packaged, tmp_path):
    images, labels = packaged[0]
    write_parquet(tmp_path / "all.parquet", images, labels * 10)
    with pytest.raises(UserError, match="holds the label 10, but not 1"):
        load_dataset("parquet", folder=tmp_path)
    data = read_dataset("parquet", folder=tmp_path, labels="remap")
    assert data.info.label_values == (0, 10, 20, 30, 40)


def test_faults_of_parquet_are_one_line(packaged, tmp_path, monkeypatch, capsys):
    images, labels = packaged[1]
    path = tmp_path / "train.parquet"

    def refused(*words):
        command = ["data", "parquet", "--data-dir", str(tmp_path), *words]
        assert cli.main(command) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    assert "train*.parquet and test*.parquet" in refused()
    path.write_bytes(b"PAR1 no table PAR1")
    assert f"{path} cannot be read (" in refused()
    pq.write_table(pa.table({"label": labels}), path)
    assert "holds 0 columns of pictures among label" in refused()
    write_parquet(path, images, labels, extra=labels)
    assert "label_column: other is not allowed" in refused("--label-column", "other")
    pq.write_table(pa.table({"img": [b"x"] * 4, "label": [0, 1, 0, 1]}), path)
    reason = "(its content is neither PNG nor JPEG)"
    assert f"row 0 of {path} cannot be read as an image {reason}" in refused()
    pq.write_table(pa.table({"img": [b"x"] * 2, "share": [0.5, 0.7]}), path)
    assert "holds the columns img (binary), share (double); allowed is a" in refused()
    table = {"img": [{"bytes": None, "path": "a.png"}, {"bytes": b"x", "path": ""}]}
    pq.write_table(pa.table(table | {"label": [0, 1]}), path)
    assert "holds no bytes in row 0 of img" in refused()
    pq.write_table(pa.table({"img": [b"x", b"x"], "label": [0, None]}), path)
    assert "holds 1 rows without a label" in refused()
    empty = {"img": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}
    pq.write_table(pa.table(empty), path)
    assert "train.parquet holds 0 rows" in refused()
    text = pa.StringArray.from_buffers(
        2, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"\xe9a")
    )
    pq.write_table(pa.table({"img": [b"x"] * 2, "label": text}), path)
    assert f"{path} cannot be read ('utf-8' codec" in refused()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'hsee-jax[parquet]'" in refused()
