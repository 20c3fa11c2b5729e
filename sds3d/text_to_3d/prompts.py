"""View words, and the prompt of a view (the convention of DreamFusion, arXiv:2209.14988, section 3.3)."""

VIEWS = ("front", "side", "back", "overhead")
OVERHEAD = 60.0  # degrees of elevation above which a view is told as overhead
FRONT, BACK = 45.0, 135.0  # |azimuth| below / above which a view is front / back


def view_of(azimuth: float, elevation: float) -> str:
    """The view word of a camera; angles in degrees, azimuth 0 in front of the object, any number of turns."""
    if elevation > OVERHEAD:
        return "overhead"
    turn = abs((azimuth + 180.0) % 360.0 - 180.0)
    return "front" if turn < FRONT else "back" if turn > BACK else "side"


def margin(azimuth: float, elevation: float) -> float:
    """Degrees to the nearest camera with another view word: near zero no judge, human or not, can tell the view."""
    if elevation > OVERHEAD:
        return elevation - OVERHEAD
    turn = abs((azimuth + 180.0) % 360.0 - 180.0)
    return min(abs(turn - FRONT), abs(turn - BACK), OVERHEAD - elevation)


def other_views(view: str) -> tuple[str, str]:
    """The two views that a prompt of this view should be kept from (Perp-Neg, arXiv:2304.04968), the likeliest mistake first."""
    return {
        "front": ("side", "back"),
        "side": ("front", "back"),
        "back": ("front", "side"),
        "overhead": ("front", "side"),
    }[view]


def view_prompt(prompt: str, view: str) -> str:
    """`a red teapot` and `front` make `a red teapot, front view`."""
    return f"{prompt}, {view} view"
