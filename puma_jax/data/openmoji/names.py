"""Names of emoji in English and thirteen other languages."""

from __future__ import annotations

from puma_jax.data.demo.packages import demo_package

Names = dict[str, str]
"""Name by language code, in the order of the package's languages; "en" is among them."""


def load_names() -> dict[str, Names]:
    """Return the names of all emoji, by the stem of their drawings.

    Raises:
        ConfigError: The demo packages are not installed.
    """
    emoji = demo_package("emoji")
    emoji.config.load_language()
    return {
        "-".join(f"{ord(character):04X}" for character in characters): {
            language: readable(data[language]) for language in emoji.LANGUAGES if language in data
        }
        for characters, data in emoji.EMOJI_DATA.items()
    }


def readable(shortcode: str) -> str:
    """Return a short code in plain words.

    >>> readable(":man_health_worker_light_skin_tone:")
    'man health worker light skin tone'
    """
    return " ".join(shortcode.strip(":").replace("_", " ").split())


def spelling(name: str) -> str:
    """Return the key under which names that read the same are equal."""
    return name.casefold()
