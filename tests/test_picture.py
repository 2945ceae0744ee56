"""Any picture becomes the pixels of a model; anything else is refused in one sentence."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFont, PngImagePlugin

from minip2p import picture, show
from minip2p.errors import UserError

SIZE = 64, 64


@pytest.fixture(autouse=True)
def no_warnings():
    """Let no library's warning reach a user, whatever the picture."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def scene(w: int = 96, h: int = 64) -> Image.Image:
    """Draw red that grows to the right, green that grows downwards, and a blue corner top left."""
    x, y = np.meshgrid(np.linspace(40, 215, w), np.linspace(40, 215, h))
    pixels = np.stack([x, y, np.full((h, w), 60.0)], axis=-1)
    pixels[: h // 4, : w // 4, 2] = 220
    return Image.fromarray(pixels.round().astype(np.uint8))


def difference(a: Image.Image, b: Image.Image) -> float:
    """Return the largest difference of two pictures' numbers."""
    return float(differences(a, b).max())


def differences(a: Image.Image, b: Image.Image) -> np.ndarray:
    assert a.size == b.size and a.mode == b.mode == "RGB"
    return np.abs(np.asarray(a).astype(int) - np.asarray(b))


# ---- Every kind ----------------------------------------------------------------------------------


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode == "LA":
        return image.convert("L").convert("LA")
    if mode == "PA":
        return image.convert("RGB").convert("P").convert("PA")
    if mode in ("La", "RGBa"):
        return as_mode(image, mode.upper()).convert(mode)
    return image.convert(mode)


@pytest.mark.parametrize(
    "mode, limit",
    {
        "RGB": 0, "RGBA": 0, "RGBX": 0, "RGBa": 0, "CMYK": 1, "YCbCr": 3, "HSV": 6,
        "P": 55, "PA": 55,  # a web palette has six levels of each colour
        "L": 0, "LA": 0, "La": 0,
    }.items(),
)  # fmt: skip
def test_modes(mode, limit):
    image = scene().convert("L").convert("RGB") if mode[0] == "L" else scene()
    assert difference(picture.whole_picture(as_mode(image, mode)), image) <= limit


def test_black_and_white():
    image = picture.whole_picture(scene().convert("1"))
    assert {colour for _, colour in image.getcolors()} == {(0, 0, 0), (255, 255, 255)}


def deep() -> tuple[np.ndarray, Image.Image]:
    """Return 16-bit numbers, and the grey picture that they are."""
    grey = np.asarray(scene().convert("L"))
    return grey.astype(np.uint16) * 257, Image.fromarray(grey).convert("RGB")


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_from_files(suffix, tmp_path):
    values, grey = deep()
    file = tmp_path / f"deep.{suffix}"
    Image.fromarray(values).save(file)
    assert difference(picture.whole_picture(file), grey) == 0


def test_other_numbers_of_pil():
    values, grey = deep()
    for dtype in ("int32", "float32"):
        array = values.astype(dtype) if dtype == "int32" else (values / 257).astype(dtype)
        assert difference(picture.whole_picture(Image.fromarray(array)), grey) == 0, dtype
    unit = Image.fromarray((values / 65535).astype("float32"))
    assert difference(picture.whole_picture(unit), grey) == 0
    big_endian = Image.frombytes("I;16B", grey.size, values.astype(">u2").tobytes())
    assert difference(picture.whole_picture(big_endian), grey) == 0


def test_transparency_is_white_paper():
    rgba = scene().convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
    alpha = np.asarray(rgba.getchannel("A"))[..., None] / 255
    by_hand = np.asarray(scene()) * alpha + 255 * (1 - alpha)
    ours = np.asarray(picture.whole_picture(rgba))
    assert np.abs(ours - by_hand).max() <= 1
    assert (ours[0] >= 253).all()


def test_transparency_of_a_palette_and_of_a_colour(tmp_path):
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 30, 30])
    palette.paste(0, (0, 0, 4, 8))
    half = bytes([0, 128])  # the first colour is transparent, the second half so
    for info, left, right in ((0, 255, 30), (half, 255, 142)):
        palette.save(tmp_path / "p.png", transparency=info)
        seen = picture.whole_picture(tmp_path / "p.png")
        assert seen.getpixel((1, 1))[1] == left and abs(seen.getpixel((6, 1))[1] - right) <= 1
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    red.save(tmp_path / "rgb.png", transparency=(255, 0, 0))
    assert picture.whole_picture(tmp_path / "rgb.png").getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation, tmp_path):
    """The blue corner comes out where the photographer saw it."""
    image = scene()
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = image.transpose(undo[orientation]) if orientation > 1 else image
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "held.png", exif=exif)
    assert difference(picture.whole_picture(tmp_path / "held.png"), image) == 0
    stored.save(tmp_path / "held.jpg", exif=exif, quality=95)
    assert differences(picture.whole_picture(str(tmp_path / "held.jpg")), image).mean() < 3


def test_nothing_but_pixels_is_kept(tmp_path):
    exif = Image.Exif()
    exif[0x8825] = {2: (52.0, 31.0, 12.0)}  # GPS latitude
    exif[0x010E] = "SECRET"
    scene().save(tmp_path / "a.jpg", exif=exif, comment=b"SECRET", icc_profile=b"SECRET" * 9)
    assert b"SECRET" in (tmp_path / "a.jpg").read_bytes()
    with Image.open(tmp_path / "a.jpg") as opened:
        assert opened.getexif().get_ifd(0x8825)
        pair = picture.read(tmp_path / "a.jpg", SIZE), picture.read(opened, SIZE)
    for seen in pair:
        for image in (seen.image, seen.whole, seen.put_back(seen.image)):
            assert not image.info and not image.getexif()
            for suffix in ("PNG", "JPEG", "WEBP"):
                file = io.BytesIO()
                image.save(file, suffix)
                assert b"SECRET" not in file.getvalue() and b"GPS" not in file.getvalue()


def test_a_cameras_jpeg_with_a_preview(tmp_path):
    scene().save(tmp_path / "a.mpo", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    with Image.open(tmp_path / "a.mpo") as opened:
        assert opened.n_frames == 2
    assert differences(picture.whole_picture(tmp_path / "a.mpo"), scene()).mean() < 3


def test_large_pictures_and_odd_metadata_are_quiet(tmp_path):
    """A photograph of 100 million pixels is no bomb; nonsense in EXIF is no damage."""
    Image.new("L", (10_000, 10_000), 128).save(tmp_path / "large.png")
    assert picture.read(tmp_path / "large.png", SIZE).image.getpixel((5, 5)) == (128, 128, 128)
    scene().save(
        tmp_path / "odd.jpg", exif=b"Exif\0\0" + b"II*\0\xff\xff\xff\x7f" + b"\x12\x01" * 9
    )
    assert picture.read(tmp_path / "odd.jpg", SIZE)


# ---- Colour profiles -----------------------------------------------------------------------------


def profile(space: bytes, *tags: tuple[bytes, bytes]) -> bytes:
    """Build an ICC profile (ICC.1:2001-04) of an input colour space."""
    head = struct.pack(">8xI4s4s4s24s28x", 0x02400000, b"prtr", space, b"XYZ ", b"")
    head = head[:36] + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    table, data = struct.pack(">I", len(tags)), b""
    for name, content in tags:
        table += struct.pack(">4sII", name, 132 + 12 * len(tags) + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    body = head[4:] + table + data
    return struct.pack(">I", len(body) + 4) + body


def xyz(*numbers: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(x * 65536) for x in numbers))


def gamma(exponent: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(exponent * 256))


def rgb_profile(red, green, blue, exponent: float) -> bytes:
    white, curve = (b"wtpt", xyz(0.9642, 1, 0.8249)), gamma(exponent)
    colours = ((b"rXYZ", xyz(*red)), (b"gXYZ", xyz(*green)), (b"bXYZ", xyz(*blue)))
    return profile(b"RGB ", white, *colours, *((n, curve) for n in (b"rTRC", b"gTRC", b"bTRC")))


# The primaries of Display P3, adapted to D50; their gamma is nearly sRGB's.
P3 = rgb_profile((0.5151, 0.2412, -0.0011), (0.292, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841), 2.2)
WHITE = (b"wtpt", xyz(0.9642, 1, 0.8249))
LINEAR_GREY = profile(b"GRAY", WHITE, (b"kTRC", gamma(1)))


def converted(image: Image.Image, icc: bytes) -> np.ndarray:
    """Convert by Pillow's ImageCms directly."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    return np.asarray(
        ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    )


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
def test_colours_of_a_profile_become_srgb(suffix, tmp_path):
    file = tmp_path / f"p3.{suffix}"
    scene().save(file, icc_profile=P3, **({"lossless": True} if suffix == "webp" else {}))
    with Image.open(file) as stored:
        expected = converted(stored.convert("RGB"), P3)
        plain = np.asarray(stored.convert("RGB")).astype(int)
    seen = picture.read(file, SIZE)
    assert (np.asarray(seen.whole) == expected).all()
    assert np.abs(expected - plain).max() > 30
    assert (np.asarray(seen.put_back(seen.image))[:, :8] == expected[:, :8]).all()
    assert not seen.put_back(seen.image).info


def test_profiles_of_transparent_and_grey_pictures():
    rgba = scene().convert("RGBA")
    rgba.putalpha(128)
    rgba.info["icc_profile"] = P3
    on_paper = (converted(scene(), P3).astype(int) + 255) / 2
    assert np.abs(np.asarray(picture.whole_picture(rgba)) - on_paper).max() <= 1
    for grey in (scene().convert("L"), scene().convert("L").convert("LA"), deep()[0]):
        grey = grey if isinstance(grey, Image.Image) else Image.fromarray(grey)
        grey.info["icc_profile"] = LINEAR_GREY
        expected = converted(scene().convert("L"), LINEAR_GREY)
        assert (np.asarray(picture.whole_picture(grey)) == expected).all()
        assert expected.min() > 90 > 60 > scene().convert("L").getextrema()[0]


def test_a_large_profile_is_read(tmp_path):
    """Profiles of printers have megabytes; their length at the front says what counts."""
    scene().save(tmp_path / "p3.png", icc_profile=P3 + bytes(2_000_000))
    assert (np.asarray(picture.whole_picture(tmp_path / "p3.png")) == converted(scene(), P3)).all()
    assert PngImagePlugin.MAX_TEXT_CHUNK == 2**20  # of the caller


def test_profiles_that_change_nothing():
    """One of sRGB, one that is broken, and those of another kind of picture."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profiles = srgb, b"", b"SECRET" * 99, P3[:150], P3[:-40], LINEAR_GREY
    for icc in profiles:
        image = scene()
        image.info["icc_profile"] = icc
        assert difference(picture.whole_picture(image), scene()) == 0
    ink = scene().convert("CMYK")
    ink.info["icc_profile"] = P3
    assert difference(picture.whole_picture(ink), ink.convert("RGB")) == 0


# ---- Large metadata ------------------------------------------------------------------------------


@pytest.mark.parametrize("after_pixels", [False, True])
@pytest.mark.parametrize(
    "kind", ["zTXt", "iTXt", "many", "checksum", "profile", "large profile", "sizes"]
)
def test_a_png_is_read_whatever_its_texts_are(kind, after_pixels, tmp_path):
    file, texts = tmp_path / "a.png", PngImagePlugin.PngInfo()
    large = "a" * 3_000_000
    if kind == "zTXt":
        texts.add_text("note", large, zip=True)
    elif kind == "iTXt":
        texts.add_itxt("note", large, zip=True)
    elif kind == "many":
        for n in range(30):
            texts.add_text(f"note {n}", large)
    elif kind == "checksum":
        texts.add_text("note", "words")
    elif kind == "sizes":
        texts.add(b"pHYs", b"")
    else:
        content = zlib.compress(large.encode() if kind == "large profile" else b"x")
        texts.add(b"zTXt", b"Raw profile type exif\0\0" + content, after_pixels)
    for n, (name, data, *_) in enumerate(texts.chunks):
        texts.chunks[n] = name, data, after_pixels
    exif = Image.Exif()
    exif[0x0112] = 3
    scene().save(file, pnginfo=texts, exif=exif)
    if kind == "checksum":
        file.write_bytes(file.read_bytes().replace(b"words", b"wards"))
    turned = scene().transpose(Image.Transpose.ROTATE_180)
    assert difference(picture.whole_picture(file), turned) == 0


def test_no_memory_is_no_damage(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise MemoryError

    scene().save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(MemoryError):
        picture.read(tmp_path / "a.png", SIZE)


def test_arrays_and_tensors():
    image = scene()
    bytes_ = np.asarray(image)
    floats = (bytes_ / 255).astype("float32")
    tensor = torch.from_numpy(bytes_.copy()).permute(2, 0, 1)
    for same in (
        *(bytes_, bytes_.astype(np.int64), bytes_.astype(np.uint16) * 257, floats),
        *(floats.astype("float64"), floats.astype("float16"), bytes_[::-1][::-1]),
        *(tensor, tensor[None], tensor / 255, (tensor / 255).half(), (tensor / 255).double()),
        *((tensor / 255).requires_grad_(), np.dstack([bytes_, np.full(bytes_.shape[:2], 255)])),
    ):
        assert difference(picture.whole_picture(same), image) == 0
    grey = bytes_[..., 0]
    for same in (grey, grey[..., None], torch.tensor(grey), torch.tensor(grey)[None]):
        assert difference(picture.whole_picture(same), Image.fromarray(grey).convert("RGB")) == 0
    assert set(picture.whole_picture(grey > 100).convert("L").tobytes()) == {0, 255}


# ---- Sizes ---------------------------------------------------------------------------------------


def test_crop_keeps_the_middle():
    seen = picture.read(scene(96, 64), SIZE)
    assert difference(seen.image, scene(96, 64).crop((16, 0, 80, 64))) == 0
    assert seen.box == (16, 0, 80, 64) and seen.inner == (0, 0, 64, 64)


def test_pad_keeps_everything():
    seen = picture.read(scene(128, 64), SIZE, "pad")
    pixels = np.asarray(seen.image)
    assert (pixels[:16] == 255).all() and (pixels[48:] == 255).all() and (pixels[16:48] < 225).all()
    assert seen.inner == (0, 16, 64, 48) and seen.box == (0, 0, 128, 64)


def test_stretch():
    seen = picture.read(scene(128, 64), SIZE, "stretch")
    assert seen.image.getpixel((0, 0))[2] > 200 and seen.image.getpixel((63, 63))[0] > 210


@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
@pytest.mark.parametrize("w, h", [(33, 97), (640, 480), (64, 64), (20, 30)])
@pytest.mark.parametrize("fit", picture.FITS)
def test_put_back(fit, w, h, size):
    """An edit changes only what was seen; without a change the picture is the same but smoothed."""
    whole = scene(w, h)
    seen = picture.read(whole, size, fit)
    assert seen.image.size == size[::-1]
    same = np.asarray(seen.put_back(seen.image)).astype(int) - np.asarray(whole)
    assert np.abs(same).mean() < 5
    black = np.asarray(seen.put_back(Image.new("RGB", seen.image.size)))
    left, top, right, bottom = seen.box
    assert (black[top:bottom, left:right] == 0).all()
    outside = np.ones((h, w), bool)
    outside[top:bottom, left:right] = False
    assert (black[outside] == np.asarray(whole)[outside]).all()
    assert fit == "crop" or not outside.any()


@pytest.mark.parametrize("w, h", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
@pytest.mark.parametrize("fit", picture.FITS)
def test_extreme_shapes(fit, w, h):
    seen = picture.read(Image.new("RGB", (w, h), (9, 99, 199)), SIZE, fit)
    assert (9, 99, 199) in {colour for _, colour in seen.image.getcolors()}
    assert seen.put_back(seen.image).getpixel((0, 0)) == (9, 99, 199)


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    scene().save(tmp_path / "a.png")
    assert difference(picture.whole_picture("~/a.png"), scene()) == 0


def test_tensor():
    tensor = picture.read(scene(), SIZE).tensor()
    assert tensor.shape == (1, 3, 64, 64) and tensor.dtype == torch.float32
    assert tensor[0, 2, 0, 0] == pytest.approx(220 / 127.5 - 1) and tensor.abs().max() <= 1


# ---- Captions ------------------------------------------------------------------------------------


def drawn(text: str) -> bytes:
    return show.row([Image.new("RGB", (256, 8))], [text]).tobytes()


def test_captions_take_a_font_that_has_the_letters():
    """No warning, no boxes: captions of other letters differ."""
    fonts = show._fonts()
    assert drawn("cat") != drawn("dog") and show._caption("cat", 200)[1] is fonts[0]
    for a, b in (("кот", "пёс"), ("γάτα", "σκύλος")) if len(fonts) > 1 else ():
        assert drawn(a) != drawn(b)
        assert show._caption(b, 200) == (b, fonts[1])


def test_letters_that_no_font_has_are_escaped_and_named_once(monkeypatch):
    monkeypatch.setattr(show, "_fonts", lambda: [ImageFont.load_default(15)])
    show._warn_of_escapes.cache_clear()
    with pytest.warns(UserWarning, match="Captions write letters that no known font") as warned:
        sheets = [drawn(text) for text in ("猫 字", "字 猫", "猫", "字", "🐱", "a\x07", "a\x1b")]
    assert len(warned) == 1 and len(set(sheets)) == len(sheets)
    assert show._caption("café 猫 \x07", 999)[0] == r"cafe \u732b \x07"
    monkeypatch.undo()
    for font in show._fonts()[1:2]:  # it has most of the letters
        assert show._caption("кот \ue000", 999) == (r"кот \ue000", font)
        assert show._caption("к \ue000\u093f", 999)[0] == r"к \ue000\u093f"  # a mark goes along


# ---- Mistakes ------------------------------------------------------------------------------------

MISTAKES = []


def bad(name: str, make, *says: str) -> None:
    """Add a mistake. make: the source, or a function that makes it in a folder"""
    MISTAKES.append(pytest.param(make, says, id=name))


def bad_file(name: str, content: bytes, *says: str) -> None:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    bad(name, make, name, *says)


def saved(kind: str, image: Image.Image | None = None, **settings) -> bytes:
    file = io.BytesIO()
    (image or scene(300, 200)).save(file, kind, **settings)
    return file.getvalue()


def short(kind: str) -> bytes:
    whole = saved(kind)
    return whole[: len(whole) * 2 // 3]


def bomb(w: int, h: int) -> bytes:
    """Build the beginning of a PNG of w x h pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", w, h, 8, 0, 0, 0, 0)
    head += struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + bytes(4) + b"IDAT"


FRAMES = {"save_all": True, "append_images": [scene(300, 200).convert("L").convert("RGB")]}
NO_PICTURE = "no picture that can be read"
bad_file("empty.png", b"", "empty")
bad_file("paper.pdf", b"%PDF-1.7\n1 0 obj\n", NO_PICTURE, "PNG")
bad_file("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", NO_PICTURE)
bad_file("program.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", NO_PICTURE)
bad_file("phone.heic", b"\0\0\0\x18ftypheic" + bytes(64), NO_PICTURE)
bad_file("magic.png", b"\x89PNG\r\n\x1a\n", NO_PICTURE)
bad_file("short.png", short("PNG"), "damaged")
bad_file("short.jpg", short("JPEG"), "damaged")
bad_file("short.webp", short("WEBP"), "can't be read")
bad_file("short.gif", short("GIF"), "damaged")
bad_file("short.tiff", short("TIFF"), "damaged")
bad_file("flipped.png", saved("PNG")[:60] + b"\xff" * 40 + saved("PNG")[100:], "damaged")
bad_file("moving.gif", saved("GIF", **FRAMES), "2 frames")
bad_file("pages.tiff", saved("TIFF", **FRAMES), "2 frames or pages")
bad_file("bomb.png", bomb(20_000, 20_000), "179 million pixels")
bad("missing", lambda folder: folder / "no.png", "no.png", "No such file")
bad("folder", lambda folder: folder, "folder")
bad("long name", lambda folder: "a" * 5000, "can't be read")
bad("empty name", "", "folder")
bad("address", "https://a.org/b.png", "https://a.org/b.png is a web address")
bad("no pixels", Image.new("RGB", (0, 5)), "0 x 5")
bad("nothing", None, "not None")
bad("bytes", saved("PNG"), "bytes")
bad("list", [[1, 2], [3, 4]], "not [[1, 2], [3, 4]]")
bad("complex", np.zeros((8, 8), complex), "real numbers")
bad("nan", np.full((8, 8, 3), np.nan), "nan")
bad("infinite", torch.full((3, 8, 8), torch.inf), "inf")
bad("minus one to one", torch.linspace(-1, 1, 192).view(3, 8, 8), "0 to 1", "-1 to 1")
bad("floats to 255", np.linspace(0, 255, 64).reshape(8, 8), "0 to 1", "0 to 255")
bad("too large numbers", np.full((8, 8), 300), "0 to 255", "300")
bad("negative floats in a TIFF", Image.fromarray(np.full((8, 8), -3, "float32")), "-3")
bad("large numbers in a TIFF", Image.fromarray(np.full((8, 8), 70_000, "int32")), "70000")
bad("channels first", np.zeros((3, 8, 8)), "3 x 8 x 8")
bad("channels last", torch.zeros(8, 8, 3), "8 x 8 x 3")
bad("two pictures", torch.zeros(2, 3, 8, 8), "2 x 3 x 8 x 8")
bad("a number in an array", np.array(0.5), "a number")
bad("no rows", np.zeros((0, 8, 3)), "0 x 8 x 3")


@pytest.mark.parametrize("make, says", MISTAKES)
def test_mistakes(make, says, tmp_path):
    source = make(tmp_path) if callable(make) else make
    with pytest.raises(UserError) as caught:
        picture.read(source, SIZE)
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence and len(sentence) < 5300
    for part in says:
        assert part in sentence
    assert caught.value.__cause__ is None and not isinstance(caught.value, UnicodeError)


def test_unknown_fit():
    with pytest.raises(UserError, match="crop, pad, stretch, not 'cover'"):
        picture.read(scene(), SIZE, "cover")
