"""Results for people and other programs: text, web pages, CSV, and the difference of two estimates."""
