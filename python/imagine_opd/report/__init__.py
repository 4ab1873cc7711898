"""What a run shows of itself: an `Explanation` as text for a terminal and as one HTML page."""

from imagine_opd.report.page import format_page, write_page
from imagine_opd.report.text import format_text

__all__ = ["format_page", "format_text", "write_page"]
