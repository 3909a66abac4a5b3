"""Predictions looked at and corrected in the browser; what is corrected is a label of the data set at once."""
