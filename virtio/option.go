package virtio

import "strings"

// SplitOption splits the value of a device's option, such as path=a,,b,readonly,
// at single commas. Two commas stand for one that belongs to the item.
func SplitOption(s string) []string {
	var items []string
	var item strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] != ',':
			item.WriteByte(s[i])
		case i+1 < len(s) && s[i+1] == ',':
			item.WriteByte(',')
			i++
		default:
			items = append(items, item.String())
			item.Reset()
		}
	}
	return append(items, item.String())
}
