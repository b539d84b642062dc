"""File formats by their content: which of them are read, and what a file is that is not read."""

from pathlib import PurePath

# Suffixes of files that claim to be images which are read: the suffix is no more than a claim.
IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm",
    ".pgm", ".pbm", ".pnm", ".pfm", ".avif", ".heic", ".heif", ".hif",
}  # fmt: skip
RAW_SUFFIXES = {
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mrw", ".nef", ".nrw", ".orf", ".pef",
    ".raf", ".raw", ".rw2", ".rwl", ".srw",
}  # fmt: skip

RAW, HEIC, VIDEO, PLACEHOLDER = "raw photo", "HEIC photo", "video", "iCloud placeholder"
NO_PHOTO = "not a photo"  # by its content and its name
REMEDIES = {  # of formats that may hold photos; a file in any other format is only counted
    RAW: "convert raw photos to JPEG or PNG",
    HEIC: "install pillow-heif (pip install pillow-heif)",
    PLACEHOLDER: "download the originals from iCloud",
    "AVIF photo": "install a Pillow that reads AVIF (11.3 or newer)",
    "JPEG XL photo": "convert JPEG XL to JPEG or PNG",
    "JPEG 2000 photo": "convert JPEG 2000 to JPEG or PNG",
    "Photoshop picture": "export Photoshop files as JPEG or PNG",
}
_MAGIC = (
    (b"\xff\x0a", "JPEG XL photo"),
    (b"\0\0\0\x0cJXL ", "JPEG XL photo"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000 photo"),
    (b"\xff\x4f\xff\x51", "JPEG 2000 photo"),
    (b"8BPS", "Photoshop picture"),
    (b"FUJIFILMCCD-RAW", RAW),
    (b"IIU\0", RAW),
    (b"IIRO", RAW),
    (b"IIRS", RAW),
    (b"MMOR", RAW),
    (b"\x1aE\xdf\xa3", VIDEO),
    (b"%PDF", "PDF"),
    (b"PK\x03\x04", "ZIP archive"),
)
CERTAIN_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")  # nothing else begins so
_IMAGE_MAGIC = (*CERTAIN_MAGIC, b"BM", *(b"P%d" % kind for kind in range(1, 7)), b"Pf", b"PF")
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"heif", b"mif1", b"mif2", b"msf1"}
HEAD = 64  # bytes of a file that tell its format


def foreign_format(name: str, head: bytes) -> str | None:
    """Return what a file is that no reader has taken for an image: by its first bytes, else by its suffix. None: unknown."""
    suffix = PurePath(name).suffix.lower()
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        if brand in _HEIF_BRANDS:
            return HEIC
        return {b"avif": "AVIF photo", b"avis": "AVIF photo", b"crx ": RAW}.get(brand, VIDEO)
    if head[:4] == b"RIFF" and head[8:11] == b"AVI":
        return VIDEO
    for magic, what in _MAGIC:
        if head.startswith(magic):
            return what
    if suffix == ".icloud":
        return PLACEHOLDER
    return RAW if suffix in RAW_SUFFIXES and head else None


def is_raw(name: str, head: bytes, tags: dict[int, object]) -> bool:
    """Return whether a TIFF is the wrapper of a raw photo, whose first picture is a thumbnail. `tags` are its first ones'."""
    reduced, dng_version = tags.get(254), 50706
    is_thumbnail = isinstance(reduced, int) and bool(reduced & 1)
    return head[8:10] == b"CR" or dng_version in tags or is_thumbnail or PurePath(name).suffix.lower() in RAW_SUFFIXES


def claims_photo(name: str) -> bool:
    """Return whether a file is a photo by its suffix, whether or not that kind is read."""
    suffix = PurePath(name).suffix.lower()
    return suffix in IMAGE_SUFFIXES or suffix in RAW_SUFFIXES


def looks_like_photo(name: str, head: bytes) -> bool:
    """Return whether a file is a photo by its suffix or its first bytes, whether or not that kind is read."""
    is_webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    return claims_photo(name) or is_webp or head.startswith(_IMAGE_MAGIC) or foreign_format(name, head) in REMEDIES
