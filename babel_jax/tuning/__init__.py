"""`babel tune`: settings of the train step compared by measurement on the devices at hand."""
