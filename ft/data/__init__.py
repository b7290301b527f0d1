"""From rows of files to packed batches. Everything here is a pure function of rows, recipe, seed and step."""
