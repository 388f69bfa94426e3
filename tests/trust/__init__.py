"Tests of trust: a package of their own, since some files share their names with those beside it."
