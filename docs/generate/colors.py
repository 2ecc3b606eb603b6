"""The colors of the pictures, on a light and on a dark page."""

THEMES = {  # the pages' colors on GitHub
    "light": {"ground": "#ffffff", "ink": "#1f2328", "faint": "#d1d9e0"},
    "dark": {"ground": "#0d1117", "ink": "#f0f6fc", "faint": "#3d444d"},
}
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#4493f8", "#db6d28", "#3fb950", "#f85149", "#ab7df8", "#7d8590"
