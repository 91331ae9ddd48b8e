"""Is a picture what its annotation says?"""
