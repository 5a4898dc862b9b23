package serial

// prefix is the key before a command for govmm: Ctrl-A.
const prefix = 0x01

const helpText = "\r\n" +
	"govmm: Ctrl-A x        quit: end this VM\r\n" +
	"       Ctrl-A h        this help\r\n" +
	"       Ctrl-A Ctrl-A   send Ctrl-A to the guest\r\n"

// escape removes commands for govmm from a user's input.
type escape struct {
	prefixed bool // the last key was the prefix
}

// filter moves the input for the guest to the front of p and returns its length. It
// calls command for each key after a prefix.
func (e *escape) filter(p []byte, command func(key byte)) int {
	n := 0
	for _, key := range p {
		switch {
		case !e.prefixed && key == prefix:
			e.prefixed = true
			continue
		case e.prefixed && key != prefix:
			e.prefixed = false
			command(key)
			continue
		}
		e.prefixed = false
		p[n] = key
		n++
	}
	return n
}
