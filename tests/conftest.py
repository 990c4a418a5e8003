"""Property tests try the same examples each time: what passed here passes there. ``make fuzz`` draws new ones."""

from hypothesis import settings

settings.register_profile("same", derandomize=True)
settings.load_profile("same")
