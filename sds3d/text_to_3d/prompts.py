"""View words, and the view-dependent prompt (DreamFusion, arXiv:2209.14988, section 3.3)."""

VIEWS = ("front", "side", "back", "overhead")
OVERHEAD = 60.0  # degrees of elevation above which a view is "overhead"
FRONT, BACK = 45.0, 135.0  # |azimuth| below / above which a view is "front" / "back"
# The two other views a prompt is contrasted with (Perp-Neg, arXiv:2304.04968), the likeliest confusion first.
CONTRAST_VIEWS = {
    "front": ("side", "back"),
    "side": ("front", "back"),
    "back": ("front", "side"),
    "overhead": ("front", "side"),
}


def view_of(azimuth: float, elevation: float) -> str:
    """The view word of a camera; angles in degrees, azimuth 0 in front, of any number of turns."""
    if elevation > OVERHEAD:
        return "overhead"
    angle = abs((azimuth + 180.0) % 360.0 - 180.0)
    return "front" if angle < FRONT else "back" if angle > BACK else "side"


def margin(azimuth: float, elevation: float) -> float:
    """Degrees to the nearest camera with another view word; near 0 the view is ambiguous."""
    if elevation > OVERHEAD:
        return elevation - OVERHEAD
    angle = abs((azimuth + 180.0) % 360.0 - 180.0)
    return min(abs(angle - FRONT), abs(angle - BACK), OVERHEAD - elevation)


def view_prompt(prompt: str, view: str) -> str:
    """`a red teapot` and `front` make `a red teapot, front view`."""
    return f"{prompt}, {view} view"
