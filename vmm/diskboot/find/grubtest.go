package find

import "strconv"

// test is the command of that name.
func (g *grub) test(args []string) bool {
	if n := len(args); n > 0 && args[n-1] == "]" {
		args = args[:n-1]
	}
	t := &grubTest{g: g, args: args}
	return t.or()
}

// grubTest reads an expression from its beginning.
type grubTest struct {
	g    *grub
	args []string
}

func (t *grubTest) take(n int) []string {
	a := t.args[:n]
	t.args = t.args[n:]
	return a
}

func (t *grubTest) or() bool {
	v := t.and()
	for len(t.args) > 0 && t.args[0] == "-o" {
		t.take(1)
		r := t.and()
		v = v || r
	}
	return v
}

func (t *grubTest) and() bool {
	v := t.not()
	for len(t.args) > 0 && t.args[0] != "-o" && t.args[0] != ")" {
		if t.args[0] == "-a" {
			t.take(1)
		}
		r := t.not()
		v = v && r
	}
	return v
}

func (t *grubTest) not() bool {
	negate := false
	for len(t.args) > 1 && t.args[0] == "!" {
		t.take(1)
		negate = !negate
	}
	return t.primary() != negate
}

func (t *grubTest) primary() bool {
	a := t.args
	if len(a) >= 3 {
		if v, ok := compareGrub(a[0], a[1], a[2]); ok {
			t.take(3)
			return v
		}
	}
	switch {
	case len(a) == 0:
		return false
	case len(a) >= 2 && len(a[0]) == 2 && a[0][0] == '-':
		arg := t.take(2)[1]
		size, isFile, isDir := t.g.stat(arg)
		switch a[0] {
		case "-z":
			return arg == ""
		case "-n":
			return arg != ""
		case "-e":
			return isFile || isDir
		case "-f":
			return isFile
		case "-d":
			return isDir
		case "-s":
			return isFile && size > 0
		}
		return false
	}
	return t.take(1)[0] != ""
}

// compareGrub compares two words; ok is false if op is no comparison.
func compareGrub(a, op, b string) (is, ok bool) {
	switch op {
	case "=", "==":
		return a == b, true
	case "!=":
		return a != b, true
	case "<":
		return a < b, true
	case ">":
		return a > b, true
	case "<=":
		return a <= b, true
	case ">=":
		return a >= b, true
	}
	x, _ := strconv.Atoi(a)
	y, _ := strconv.Atoi(b)
	switch op {
	case "-eq":
		return x == y, true
	case "-ne":
		return x != y, true
	case "-lt":
		return x < y, true
	case "-le":
		return x <= y, true
	case "-gt":
		return x > y, true
	case "-ge":
		return x >= y, true
	}
	return false, false
}
