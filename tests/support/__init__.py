"""Code that several test files share. Test files do not import each other."""
