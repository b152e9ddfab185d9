"""Every kind of source becomes a Program and the reference it is compared with."""
