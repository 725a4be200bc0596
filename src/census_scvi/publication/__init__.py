"""Publishing: gate measurements, model card, hub folder, obsm, provenance, verification."""
