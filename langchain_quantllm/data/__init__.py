"""Tables and texts: advice for names of other libraries, and texts for calibration and evaluation."""
