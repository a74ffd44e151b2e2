"""From a weight file to answers, figures, drawings and exported files."""
