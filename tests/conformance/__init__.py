"""One list of checks that every family must pass: `checks` says what, `setups` where a member is special."""
