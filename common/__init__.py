"""Small things below everything else, without torch: what text, files and mistakes share."""
