"""Dataset folder -> a page that shows it: pictures, annotation, scores, hand and object."""
