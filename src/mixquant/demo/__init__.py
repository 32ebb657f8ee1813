"""The shipped model, its transcripts, and the show that `mixquant demo` makes of them."""
