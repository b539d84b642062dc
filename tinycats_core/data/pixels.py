"""From an opened image of any kind to a square of sRGB pixels."""

import io
from contextlib import suppress

import numpy as np
from PIL import Image, ImageCms, ImageOps

ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)
LARGE = 16_000_000  # pixels, above which an image is averaged down before anything else, and decoded alone
PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # a profile's colour space and the mode that it describes
WHOLE_BITS = (8, 12, 16)  # of integers, before what their highest value needs
FLOAT_TOPS = (1, 255, 65_535)  # of floating-point grey


def to_square(image: Image.Image, size: int, centering: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """Return a loaded image upright, over white where transparent, cut to a square, in sRGB.

    `centering` says where the square lies in the upright image, from (0, 0), left and top, to (1, 1).

    Raises:
        ValueError: grey values are of no known range.
    """
    orientation, profile = _orientation(image), _profile(image)
    if image.width * image.height > LARGE and image.mode in ("L", "LA", "RGB", "RGBA", "CMYK", "F", "I"):
        image = image.reduce(max(1, min(image.size) // (4 * size)))
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    flat = image if image.mode == "CMYK" and profile and profile[0] == "CMYK" else _flattened(image)
    square = ImageOps.fit(flat, (size, size), Image.Resampling.LANCZOS, centering=centering)
    return _to_srgb(square, *profile) if profile else square


def upright_size(image: Image.Image, width: int, height: int) -> tuple[int, int]:
    """Return width and height of a loaded image once it is upright; as they are stored, they are `width` and `height`."""
    return (height, width) if _orientation(image) in SIDEWAYS else (width, height)


def _orientation(image: Image.Image) -> int:
    """Return the orientation tag alone: the other metadata may be odd."""
    with suppress(Exception):  # of many kinds, on damaged metadata
        return int(image.getexif().get(ORIENTATION, 1))
    return 1


def _profile(image: Image.Image) -> tuple[str, ImageCms.ImageCmsProfile] | None:
    """Return the image's colour profile, after the mode that it describes; None if it is sRGB, or cannot be used."""
    content = image.info.get("icc_profile")
    if not content:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        is_srgb = ImageCms.getProfileDescription(profile).strip().lower().startswith("srgb")
    except (OSError, ImageCms.PyCMSError, TypeError, ValueError):
        return None
    mode = PROFILE_MODES.get(str(getattr(profile.profile, "xcolor_space", "")).strip())
    return (mode, profile) if mode and not is_srgb else None


def _to_srgb(square: Image.Image, mode: str, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    """Convert from a profile to sRGB; a profile that does not go with the pixels is left out of account."""
    if "CMYK" in (mode, square.mode) and mode != square.mode:
        return square.convert("RGB")
    try:
        converted = ImageCms.profileToProfile(
            square.convert(mode),
            profile,
            ImageCms.createProfile("sRGB"),
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return square.convert("RGB")
    assert converted is not None  # it is not done in place
    return converted


def _flattened(image: Image.Image) -> Image.Image:
    """Return an image as RGB of 8 bits, over white where it is transparent. Raises ValueError."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_grey_levels(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _grey_levels(image: Image.Image) -> np.ndarray:
    """Return grey of 16 or 32 bits, or of floating-point numbers, as uint8 (H, W), scaled by the range that its values fill."""
    pixels = np.asarray(image)
    if image.mode.startswith("I;16"):
        return (pixels >> 8).astype(np.uint8)
    low, high = float(pixels.min()), float(pixels.max())
    if image.mode == "I" and low >= 0:
        bits = next((bits for bits in WHOLE_BITS if high < 2**bits), int(high).bit_length())
        return (pixels >> (bits - 8)).astype(np.uint8)
    for top in FLOAT_TOPS:  # resampling may have left values a little outside
        if image.mode == "F" and (top == 1 or high > top / 8) and high <= 1.1 * top and low >= -0.1 * top:
            return (pixels.clip(0, top) * (255 / top)).round().astype(np.uint8)
    tops = "" if image.mode == "I" else f", up to {', '.join(map(str, FLOAT_TOPS))}"
    raise ValueError(f"its values run from {low:g} to {high:g}; grey is read from 0{tops}")
