"""Files and hub data sets -> rows -> token ids."""
