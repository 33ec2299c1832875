"""Published methods to compare with, in the interface of our own: a Problem in, an Assignment out."""
