from brainenc.guard.glances import Text

CONTRACT: int

def glances(inbox: int, nap_s: float, until: float, texts: tuple[Text, ...], /) -> list[tuple[float, int]]: ...
