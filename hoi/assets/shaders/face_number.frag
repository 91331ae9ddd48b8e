#version 330 core
out vec4 number;
void main() {
    int n = gl_PrimitiveID + 1;
    number = vec4(float(n & 255), float((n >> 8) & 255), float((n >> 16) & 255), 255.0) / 255.0;
}
