"""Everything a person sees of a run: screen, pictures, page, doctor, trackers."""
