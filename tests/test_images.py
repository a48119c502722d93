"Every odd kind of image file, the square, and the views."

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from adaptkit.core.registry import AdaptkitError
from adaptkit.data.images import Augment, Preprocess, augment, preprocess, problem, read_image, uniforms

def ramp(height: int = 24, width: int = 40) -> np.ndarray:
    "Grey levels that rise from left to right."
    return np.tile(np.linspace(0, 255, width).round().astype(np.uint8), (height, 1))


def test_plain_colour_and_grey(tmp_path: Path) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(colour).save(tmp_path / "c.png")
    Image.fromarray(ramp()).save(tmp_path / "g.png")
    assert (read_image(tmp_path / "c.png") == colour).all()
    assert (read_image(tmp_path / "g.png") == ramp()[..., None]).all() and read_image(tmp_path / "g.png").shape[2] == 3
    assert read_image(tmp_path / "c.png", channels=1).shape == (20, 30, 1)


@pytest.mark.parametrize("name", ["deep.png", "deep.tiff"])
def test_16_bit_is_scaled_by_its_full_range_not_clipped(tmp_path: Path, name: str) -> None:
    Image.fromarray(ramp().astype(np.uint16) * 257).save(tmp_path / name)
    assert (read_image(tmp_path / name, channels=1)[..., 0] == ramp()).all()


def test_dark_16_bit_stays_dark(tmp_path: Path) -> None:
    Image.fromarray(np.full((10, 12), 300, np.uint16)).save(tmp_path / "dark.png")
    assert (read_image(tmp_path / "dark.png") == 1).all()


def test_numbers_of_unknown_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((10, 12), 0.5, np.float32)).save(tmp_path / "f.tiff")
    Image.fromarray(np.full((10, 12), 70000, np.int32)).save(tmp_path / "i.tiff")
    assert "floating-point" in problem(tmp_path / "f.tiff")
    assert "0 to 65535" in problem(tmp_path / "i.tiff")


def test_palette_cmyk_and_bilevel(tmp_path: Path) -> None:
    red = Image.new("RGB", (16, 12), (250, 10, 20))
    red.quantize(4).save(tmp_path / "p.png")
    red.convert("CMYK").save(tmp_path / "k.jpg", quality=95)
    Image.new("1", (16, 12), 1).save(tmp_path / "b.png")
    assert np.abs(read_image(tmp_path / "p.png")[0, 0].astype(int) - [250, 10, 20]).max() <= 4
    assert np.abs(read_image(tmp_path / "k.jpg")[5, 5].astype(int) - [250, 10, 20]).max() <= 8
    assert (read_image(tmp_path / "b.png") == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_becomes_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (16, 12), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (8, 0, 16, 12))
    if mode == "P":
        image.quantize(8).save(tmp_path / "t.png")
    else:
        image.convert(mode).save(tmp_path / "t.png")
    got = read_image(tmp_path / "t.png")
    assert (got[:, :8] == 255).all() and (got[:, 8:] == 0).all()


def test_transparent_colour_of_a_plain_png(tmp_path: Path) -> None:
    Image.new("RGB", (16, 12), (7, 8, 9)).save(tmp_path / "t.png", transparency=(7, 8, 9))
    assert (read_image(tmp_path / "t.png") == 255).all()


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_animated_gives_its_first_frame(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (16, 12), c) for c in ("white", "black", "red")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    assert (read_image(tmp_path / f"a.{suffix}") == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int) -> None:
    "Undo each of the eight orientations by hand, store with the tag, and read the original again."
    original = np.zeros((24, 40), np.uint8)
    original[:8, :8], original[:8, 32:] = 255, 128  # bright top left, grey top right
    turns = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: np.transpose,
             6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).T, 8: lambda a: np.rot90(a, 3)}  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(turns[orientation](original))
    Image.fromarray(stored).save(tmp_path / "e.png", exif=exif)
    assert (read_image(tmp_path / "e.png", channels=1)[..., 0] == original).all()


@pytest.mark.parametrize("at_least", [0, 32])
def test_a_turned_photograph_is_upright_at_every_scale(tmp_path: Path, at_least: int) -> None:
    "A JPEG may be decoded at a fraction of its size; it has to be turned all the same."
    original = np.zeros((240, 400), np.uint8)
    original[:120, :200] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(original, 1))).save(tmp_path / "e.jpg", exif=exif, quality=95)
    found = read_image(tmp_path / "e.jpg", at_least=at_least, channels=1)[..., 0]
    h, w = found.shape
    assert w > h and (h < 240) == bool(at_least)
    assert found[: h // 2 - 2, : w // 2 - 2].min() > 200 and found[h // 2 + 2 :].max() < 50


def test_16_bits_in_colour(tmp_path: Path) -> None:
    "Pillow reads 16-bit colour with 8 bits a channel; a PNG written by hand shows that it scales and doesn't clip."
    import struct
    import zlib

    pixels = np.arange(10 * 12 * 3, dtype=np.uint16).reshape(10, 12, 3) * 182  # up to 65,338
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 12, 10, 16, 2, 0, 0, 0)
    (tmp_path / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    found = read_image(tmp_path / "c.png").astype(int)
    assert found.shape == (10, 12, 3) and abs(found - np.rint(pixels / 257)).max() <= 1


def test_files_that_would_start_other_programs_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "e.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\nshowpage\n")
    assert "not an image in a format" in problem(tmp_path / "e.png")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_cost_the_picture(tmp_path: Path) -> None:
    Image.fromarray(ramp()).save(tmp_path / "e.jpg", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01")
    assert read_image(tmp_path / "e.jpg").shape == (24, 40, 3)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
def test_truncated_is_named(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    whole, part = tmp_path / f"whole.{suffix}", tmp_path / f"part.{suffix}"
    Image.fromarray(noise).save(whole)
    part.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    assert not problem(whole)
    with pytest.raises(AdaptkitError, match=f"Cannot read the image .*part.{suffix}: .+"):
        read_image(part)
    assert problem(part)


def test_truncated_png_and_jpeg_say_so(tmp_path: Path) -> None:
    for suffix in ("png", "jpg"):
        buffer = io.BytesIO()
        noise = np.random.default_rng(1).integers(0, 256, (64, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(buffer, "png" if suffix == "png" else "jpeg")
        (tmp_path / f"x.{suffix}").write_bytes(buffer.getvalue()[:-800])
        assert problem(tmp_path / f"x.{suffix}") == "the file is truncated: its end is missing"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_every_prefix_of_a_file_gives_a_sentence_or_a_picture(tmp_path: Path) -> None:
    for kind in ("png", "jpeg", "gif", "tiff"):
        buffer = io.BytesIO()
        Image.fromarray(ramp()).save(buffer, kind)
        for end in range(0, len(buffer.getvalue()), 7):
            path = tmp_path / f"x.{kind}"
            path.write_bytes(buffer.getvalue()[:end])
            problem(path)  # anything but AdaptkitError would escape


def test_zero_bytes_and_non_images(tmp_path: Path) -> None:
    (tmp_path / "zero.png").touch()
    (tmp_path / "text.jpg").write_text("I am a letter")
    assert problem(tmp_path / "zero.png") == "the file is empty (0 bytes)"
    assert "not an image" in problem(tmp_path / "text.jpg")
    with pytest.raises(AdaptkitError, match="gone.png: No such file"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(AdaptkitError, match="Cannot read the image"):
        read_image(tmp_path)


@pytest.mark.parametrize("size", [(1, 1), (7, 100), (100, 7)])
def test_too_small(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("L", size).save(tmp_path / "s.png")
    assert f"{size[0]} x {size[1]} pixels" in problem(tmp_path / "s.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_001, 13_000, 20_000, 2_000_000])
def test_decompression_bomb_is_refused_by_its_header(tmp_path: Path, side: int) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(bomb)
    assert "megapixels" in problem(tmp_path / "bomb.png")


def test_smaller_decoding_of_a_jpeg_changes_little(tmp_path: Path) -> None:
    y, x = np.mgrid[0:800, 0:1200]
    Image.fromarray((127 + 60 * np.sin(x / 50) + 60 * np.cos(y / 40)).astype(np.uint8)).save(
        tmp_path / "j.jpg", quality=95
    )
    small = read_image(tmp_path / "j.jpg", at_least=128)
    assert small.shape[:2] == (200, 300)
    spec = Preprocess(size=64)
    full = preprocess(read_image(tmp_path / "j.jpg"), spec)
    assert np.abs(full.astype(int) - preprocess(small, spec)).mean() < 1.0


# The square ----------------------------------------------------------------------------------------------------------


def test_fits() -> None:
    image = np.repeat(ramp(20, 60)[..., None], 3, axis=2)
    squash, crop, pad = (preprocess(image, Preprocess(16, fit)) for fit in ("squash", "crop", "pad"))
    assert squash.shape == crop.shape == pad.shape == (3, 16, 16) and squash.dtype == np.uint8
    assert squash[0, 8, 0] < 20 and squash[0, 8, -1] > 235  # everything is there
    assert 70 < crop[0, 8, 0] < crop[0, 8, -1] < 185  # the middle third
    assert (pad[:, 0] == 0).all() and pad[0, 8, -1] > 200  # black bars above and below


def test_preprocess_keeps_what_is_right_already() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 1), dtype=np.uint8)
    assert (preprocess(image, Preprocess(16)) == image.transpose(2, 0, 1)).all()


def test_preprocess_is_antialiased() -> None:
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None]
    assert np.abs(preprocess(board, Preprocess(8)).astype(int) - 127).max() <= 3


@pytest.mark.parametrize("wrong", [dict(size=0), dict(size=-3), dict(fit="stretch")])
def test_preprocess_refuses(wrong: dict) -> None:
    with pytest.raises(AdaptkitError, match="must be"):
        Preprocess(**wrong)


# Views ---------------------------------------------------------------------------------------------------------------

FULL = Augment(vflip=True, rotate=20, shift=0.1, zoom=0.2, brightness=0.2, contrast=0.3)


def pictures(n: int = 5, c: int = 3, h: int = 12, w: int = 17) -> torch.Tensor:
    return torch.rand(n, c, h, w, generator=torch.Generator().manual_seed(0))


def test_view_0_is_the_identity() -> None:
    x = pictures()
    assert torch.equal(augment(x, 0, torch.arange(5), spec=FULL), x)


def test_first_four_views_are_the_four_flips() -> None:
    x, index = pictures(), torch.arange(5)
    views = [augment(x, v, index, spec=Augment(hflip=True, vflip=True)) for v in range(8)]
    for got, axes in zip(views, ([], [-1], [-2], [-1, -2]) * 2, strict=True):
        assert torch.equal(got, torch.flip(x, axes))
    only = augment(x, 1, index, spec=Augment(hflip=False, vflip=True))
    assert torch.equal(only, x.flip(-2))
    none = augment(x, 3, index, spec=Augment(hflip=False))
    assert torch.equal(none, x)


@settings(max_examples=25, deadline=None)
@given(view=st.integers(0, 40), seed=st.integers(-5, 2**70), rows=st.permutations(range(5)), cut=st.integers(1, 5))
def test_a_view_does_not_depend_on_its_batch(view: int, seed: int, rows: list[int], cut: int) -> None:
    x, index = pictures(), torch.tensor([3, 10**12, 0, 77, 5])
    whole = augment(x, view, index, spec=FULL, seed=seed)
    part = augment(x[rows[:cut]], view, index[rows[:cut]], spec=FULL, seed=seed)
    assert torch.equal(part, whole[rows[:cut]])
    assert whole.min() >= 0 and whole.max() <= 1 and whole.shape == x.shape


def test_views_seeds_and_rows_differ_and_nothing_global_is_touched() -> None:
    x, index = pictures(1).expand(5, -1, -1, -1), torch.arange(5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = augment(x, 4, index, spec=FULL)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(a, augment(x, 8, index, spec=FULL))
    assert not torch.equal(a, augment(x, 4, index, spec=FULL, seed=1))
    assert len({tuple(p.flatten().tolist()) for p in a}) == 5


def test_draws_are_uniform_and_unrelated() -> None:
    u = uniforms(torch.arange(20_000), view=3, seed=0, count=6).double()
    assert u.min() >= -1 and u.max() < 1
    assert u.mean(0).abs().max() < 0.02 and (u.var(0) - 1 / 3).abs().max() < 0.01
    columns = torch.cat([u[:-1], u[1:], uniforms(torch.arange(19_999), view=4, seed=0, count=6).double()], 1)
    assert (torch.corrcoef(columns.T) - torch.eye(18)).abs().max() < 0.04


@pytest.mark.parametrize("name", ["rotate", "shift", "zoom", "brightness", "contrast"])
def test_every_option_changes_something_and_is_bounded(name: str) -> None:
    x, index = pictures(), torch.arange(5)
    small = augment(x, 2, index, spec=Augment(hflip=False, **{name: 0.2}))
    assert not torch.equal(small, x)
    with pytest.raises(AdaptkitError, match=f"{name} is"):
        Augment(**{name: -0.1})
    with pytest.raises(AdaptkitError, match=f"{name} is"):
        Augment(**{name: 1000})


def test_a_shift_moves_by_the_stated_share() -> None:
    x = torch.zeros(400, 1, 21, 41)
    x[:, :, 10, 20] = 1
    y = augment(x, 1, torch.arange(400), spec=Augment(hflip=False, shift=0.2))
    column = (y * torch.arange(41.0)).sum((1, 2, 3)) / y.sum((1, 2, 3)) - 20
    row = (y * torch.arange(21.0)[:, None]).sum((1, 2, 3)) / y.sum((1, 2, 3)) - 10
    assert column.abs().max() <= 0.2 * 41 + 1e-3 and column.abs().max() > 0.19 * 41
    assert row.abs().max() <= 0.2 * 21 + 1e-3 and row.abs().max() > 0.19 * 21


def test_a_turn_is_rigid_when_the_image_is_not_square() -> None:
    "A point 8 pixels right of the centre stays 8 pixels from it, whatever the angle."
    x = torch.zeros(50, 1, 41, 61)
    x[:, :, 20, 38] = 1
    y = augment(x, 1, torch.arange(50), spec=Augment(hflip=False, rotate=90))
    column = (y * torch.arange(61.0)).sum((1, 2, 3)) / y.sum((1, 2, 3)) - 30
    row = (y * torch.arange(41.0)[:, None]).sum((1, 2, 3)) / y.sum((1, 2, 3)) - 20
    assert ((column**2 + row**2).sqrt() - 8).abs().max() < 0.3


def test_augment_refuses() -> None:
    x, index = pictures(), torch.arange(5)
    with pytest.raises(AdaptkitError, match="takes floats"):
        augment((x * 255).byte(), 1, index, spec=FULL)
    with pytest.raises(AdaptkitError, match="5 images but 4 row numbers"):
        augment(x, 1, index[:4], spec=FULL)
    with pytest.raises(AdaptkitError, match="view is -1"):
        augment(x, -1, index, spec=FULL)
