"""The report on an adapter or an artefact."""
