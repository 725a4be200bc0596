"""Publishing: measuring the gates, model card, hub folder, obsm, provenance, verification."""
