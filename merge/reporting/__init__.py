"""Reports on adapters and artefacts: their figures as JSON, pictures, and an HTML page."""
