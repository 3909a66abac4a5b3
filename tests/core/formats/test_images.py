"""Images: against hand-made arrays, OpenCV as second reader, and one bad file per kind of damage."""

import re

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from core.errors import UserError
from core.formats.images import IMAGE_SUFFIXES, find_images, image_suffix, read_geometry, read_image

GREY8 = np.random.default_rng(0).integers(0, 256, (31, 20), dtype=np.uint8)
GREY16 = np.random.default_rng(1).integers(0, 65536, (31, 20), dtype=np.uint16)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".bmp", ".PNG"])
def test_8_bit_values_stay(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    cv2.imwrite(str(path), GREY8)
    pixels = read_image(path)
    assert pixels.dtype == np.float32 and pixels.shape == (1, 31, 20)
    assert np.array_equal(pixels[0], GREY8)
    assert read_geometry(path).size == (31, 20)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_values_stay(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    cv2.imwrite(str(path), GREY16)
    assert np.array_equal(read_image(path)[0], cv2.imread(str(path), cv2.IMREAD_UNCHANGED))
    assert np.array_equal(read_image(path)[0], GREY16)


def test_jpeg_equals_opencv(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(GREY8).save(path)
    assert np.abs(read_image(path)[0] - cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)).max() <= 1


def test_float_tiff_stays(tmp_path):
    values = np.array([[-1.5, 0.25], [3e6, 1e-3]], dtype=np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert np.array_equal(read_image(tmp_path / "a.tif")[0], values)


def test_colour_becomes_luminance(tmp_path):
    Image.new("RGB", (2, 1), (100, 200, 50)).save(tmp_path / "a.png")  # 29.9 + 117.4 + 5.7
    assert read_image(tmp_path / "a.png") == pytest.approx(np.full((1, 1, 2), 153.0))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_colour_keeps_its_depth(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    blue, green, red = 1001, 30003, 60007
    cv2.imwrite(str(path), np.full((3, 2, 3), (blue, green, red), dtype=np.uint16))
    assert read_image(path) == pytest.approx(np.full((1, 3, 2), 0.299 * red + 0.587 * green + 0.114 * blue))


def test_palette_is_looked_up(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([200, 200, 200, 7, 7, 7])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").ravel() == pytest.approx([200, 7])


def test_alpha_is_ignored(tmp_path):
    Image.merge("LA", [Image.new("L", (2, 2), 90), Image.new("L", (2, 2), 0)]).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") == 90).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_white_is_zero_is_inverted(tmp_path, dtype):
    stored = np.array([[0, 1], [2, 100]], dtype=dtype)
    Image.fromarray(stored).save(tmp_path / "a.tif", tiffinfo={262: 0})
    raw = np.array(Image.open(tmp_path / "a.tif")).astype(int)  # Pillow turns 8 bits over, in writing and reading
    expected = stored if dtype == np.uint8 else 65535 - raw
    assert np.array_equal(read_image(tmp_path / "a.tif")[0], expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_orientation_is_applied(tmp_path, suffix, orientation):
    path = tmp_path / f"a{suffix}"
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(GREY8).save(path, exif=exif)
    source = Image.fromarray(GREY8)
    source.getexif()[274] = orientation
    expected = np.array(ImageOps.exif_transpose(source))
    assert np.array_equal(read_image(path)[0], expected)
    assert read_geometry(path).size == expected.shape == ((20, 31) if orientation >= 5 else (31, 20))


def test_orientation_6_by_hand(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # the stored picture is to be turned clockwise
    Image.fromarray(np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint8)).save(tmp_path / "a.png", exif=exif)
    assert read_image(tmp_path / "a.png")[0].tolist() == [[4, 1], [5, 2], [6, 3]]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".bmp"])
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.9])
def test_cut_file(tmp_path, suffix, kept):
    path = tmp_path / f"cut{suffix}"
    Image.fromarray(GREY8).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UserError, match=re.escape(f"cut{suffix} cannot be read")):
        read_image(path)


def test_cut_16_bit_colour(tmp_path):
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), np.dstack([GREY16] * 3))
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(UserError, match=r"a\.png cannot be read"):
        read_image(path)


def test_cut_tiff_directory(tmp_path):
    path = tmp_path / "a.tif"
    cv2.imwrite(str(path), GREY16.astype(np.float32))
    content = path.read_bytes()
    for missing in range(2, 120, 7):
        path.write_bytes(content[:-missing])
        try:
            pixels = read_image(path)
        except UserError:
            continue
        assert np.array_equal(pixels[0], GREY16)


@pytest.mark.parametrize("read", [read_image, read_geometry])
def test_files_that_are_no_images(tmp_path, read):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello, this is no picture")
    (tmp_path / "a.gif").write_bytes(b"GIF89a")
    (tmp_path / "folder.png").mkdir()
    for name, message in {
        "none.png": "none.png does not exist",
        "empty.png": r"empty.png is empty \(0 bytes\)",
        "text.png": "text.png cannot be read.* not a PNG, JPEG, TIFF, BMP or WebP",
        "a.gif": "a.gif has no supported suffix; choose from " + ", ".join(IMAGE_SUFFIXES),
        "folder.png": "folder.png is not a file",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_several_pages(tmp_path):
    page = Image.fromarray(GREY8)
    page.save(tmp_path / "a.tif", save_all=True, append_images=[page, page])
    with pytest.raises(UserError, match="a.tif holds 3 pages"):
        read_image(tmp_path / "a.tif")


def test_non_finite_pixels(tmp_path):
    values = np.ones((4, 5), dtype=np.float32)
    values[2, 3], values[3, 0] = np.nan, np.inf
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif has 2 non-finite pixels, first at \(y, x\)=\(2, 3\)"):
        read_image(tmp_path / "a.tif")


def test_find_images_skips_what_is_hidden_or_no_image(tmp_path):
    for name in ("b.png", "a/c.JPG", "a/._c.JPG", "__MACOSX/d.png", "notes.txt", ".png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == [tmp_path / "b.png"]
    assert find_images(tmp_path, recursive=True) == [tmp_path / "a/c.JPG", tmp_path / "b.png"]
    assert image_suffix("1.2.840.JPG") == ".JPG" and image_suffix("1.2.840") is None


def test_find_images_is_what_a_walk_with_pathlib_finds(tmp_path):
    """Order, hidden files and folders, links; the order is that in which runs see images."""
    for name in ("b/10.png", "b/9.PNG", "b-1/a.nii.gz", "b.x/c.jpg", ".hidden/d.png", "b/.e.png", "__MACOSX/f.png",
                 "z.png", "a.txt", "b/\u00fc.tif", "png", ".png", "n.nii.gz/g.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    root = tmp_path / "images"
    (root / "link.png").symlink_to(root / "z.png")
    (root / "nowhere.png").symlink_to(root / "gone.png")
    (root / "linked").symlink_to(root / "b", target_is_directory=True)
    for recursive in (False, True):
        paths = [path for path in (root.rglob("*") if recursive else root.iterdir()) if not path.is_dir()
                 and not any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(root).parts)]
        wanted = sorted(path for path in paths if path.name.lower().endswith(IMAGE_SUFFIXES)
                        and path.name.lower() not in IMAGE_SUFFIXES)
        assert find_images(root, recursive) == wanted and len(wanted) == (9 if recursive else 3)
