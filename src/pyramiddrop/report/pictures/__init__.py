"""Pictures of one prefill: what each stage kept and how it scored, as figures, films and a page to click through."""
