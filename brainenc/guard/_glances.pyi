from brainenc.guard.glances import Glance, Text

CONTRACT: int

def glances(inbox: int, nap_s: float, until: float, texts: tuple[Text, ...], /) -> list[Glance]: ...
